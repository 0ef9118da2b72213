"""A run that was stopped, killed or damaged ends exactly where an undisturbed one does."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from commands import Command, numbers

from engram_jax.config import replace
from engram_jax.errors import INTERRUPTED, TERMINATED
from engram_jax.runs.checkpoint import UNFINISHED
from engram_jax.runs.load import load_run
from engram_jax.training.loop import train


def outcome(folder):
    """result.json without times."""
    result = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in result.items() if not k.startswith("goodput/")}


def assert_same_end(result, straight):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.state), straight.state)
    assert result.evaluation == straight.result.evaluation


def interrupting(number, at, lines, times=1):
    """A log that sends this process a signal when it sees a line that begins with `at`."""

    def log(line):
        lines.append(line)
        if line.startswith(at):
            for _ in range(times):
                os.kill(os.getpid(), number)

    return log


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_stopped_and_resumed_is_undisturbed(config, straight, tmp_path, number):
    lines = []
    handler = signal.getsignal(number)
    stopped = train(config, tmp_path, interrupting(number, "step  6/12", lines))
    assert signal.getsignal(number) is handler
    assert stopped.status == {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}[number]
    assert stopped.evaluation is None and not (tmp_path / "result.json").exists()
    step = int(stopped.state.step)
    assert 6 <= step < 12
    assert lines[-1] == f"Stopped at step {step}, saved. The same command continues from here."
    result = train(config, tmp_path, lines.append)
    assert f"Resumed at step {step} of 12." in lines
    assert numbers(tmp_path) == numbers(straight.folder)
    assert_same_end(result, straight)


def test_a_second_interrupt_stops_at_once(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, interrupting(signal.SIGINT, "step  6/12", [], times=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


@pytest.fixture
def cut_off(straight, tmp_path):
    """The folder of the undisturbed run as if it had been killed while it saved its last step."""
    folder = shutil.copytree(straight.folder, tmp_path / "run")
    (folder / "checkpoints" / "12").rename(folder / "checkpoints" / f"12{UNFINISHED}-1")
    (folder / "result.json").unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().rstrip()[:-20])
    return folder


def test_killed_while_saving_is_undisturbed(config, straight, cut_off):
    lines = []
    assert_same_end(train(config, cut_off, lines.append), straight)
    assert "Checkpoint 12 was only half written when the run ended: skipped." in lines
    assert "Resumed at step 8 of 12." in lines
    assert numbers(cut_off) == numbers(straight.folder)
    assert outcome(cut_off) == outcome(straight.folder)


@pytest.mark.slow
def test_settings_that_touch_no_number_may_change(config, straight, cut_off):
    changed = replace(config, train__log_every=3, train__eval_every=0, checkpoint__every=1, checkpoint__keep=1)
    assert_same_end(train(changed, cut_off), straight)
    assert [line["step"] for line in numbers(cut_off) if "loss" in line] == [*range(1, 9), 9, 12]


@pytest.mark.slow
@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_costs_its_steps_only(config, straight, tmp_path):
    folder = shutil.copytree(straight.folder, tmp_path / "run")
    for path in (folder / "checkpoints" / "12" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:  # which of them holds which array is Orbax's business
            os.truncate(path, path.stat().st_size // 2)
    lines = []
    assert_same_end(train(config, folder, lines.append), straight)
    assert sum(line.startswith("Checkpoint 12 cannot be read (") for line in lines) == 1
    assert "Resumed at step 8 of 12." in lines
    assert numbers(folder) == numbers(straight.folder)
    lines.clear()
    train(config, folder, lines.append)
    assert "All 12 steps are done already: only the evaluation is repeated." in lines


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"mesh_fsdp": 4}, {"mesh_fsdp": 2, "mesh_tensor": 2, "grad_accum": 2}])
def test_a_run_moves_to_another_mesh(config, straight, cut_off, other):
    result = train(replace(config, **{f"train__{name}": value for name, value in other.items()}), cut_off)
    assert result.parts.mesh.shape["fsdp"] == other["mesh_fsdp"]
    assert result.evaluation.loss == pytest.approx(straight.result.evaluation.loss, abs=1e-3)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(config, tmp_path):
    undisturbed, stopped = (Command(config, tmp_path / name) for name in ("undisturbed", "stopped"))
    undisturbed.finish()
    process = stopped.start()
    for line in process.stdout:
        if line.startswith("step  6/12"):
            process.send_signal(signal.SIGINT)
            break
    rest, err = process.communicate()
    assert process.returncode == INTERRUPTED and "Traceback" not in err
    assert "saved. The same command continues from here." in rest
    assert "Resumed at step" in stopped.finish()
    assert numbers(stopped.folder) == numbers(undisturbed.folder)
    ends = [jax.device_get(load_run(command.folder)[0]) for command in (stopped, undisturbed)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def is_half_written(folder):
    return any(UNFINISHED in path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_kill_9_again_and_again(config, tmp_path, rng):
    """At random moments, and every other time in the middle of a checkpoint, until the run is done."""
    config = replace(config, train__steps=40, checkpoint__every=1)
    undisturbed, killed = (Command(config, tmp_path / name) for name in ("undisturbed", "killed"))
    undisturbed.finish()
    half_written = 0
    for attempt in range(6):
        process = killed.start()
        steps_left = rng.integers(1, 5) if attempt else 4  # the first leaves a checkpoint for certain
        for line in process.stdout:
            steps_left -= line.startswith("step ") and "loss" in line
            if steps_left == 0:
                break
        while attempt % 2 and process.poll() is None and not is_half_written(killed.folder):
            time.sleep(0.0005)  # a checkpoint follows every step: one is begun soon
        process.kill()
        process.communicate()
        half_written += is_half_written(killed.folder)
    assert half_written > 0
    out = killed.finish()
    assert "Resumed at step" in out
    assert numbers(killed.folder) == numbers(undisturbed.folder)
    ends = [jax.device_get(load_run(command.folder)[0]) for command in (killed, undisturbed)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
