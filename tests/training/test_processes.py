"""Several real processes over the loopback: the numbers of one, one stop for all, no survivor that hangs."""

import shutil
import signal

import pytest
from commands import Together, numbers

from engram_jax.config import replace
from engram_jax.errors import GOES_ON, MISTAKEN, TERMINATED
from engram_jax.runs.checkpoint import UNFINISHED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(config):
    """`command(run_dir, processes, devices of each, **changes)`"""

    def build(run_dir, count, devices, **changes):
        return Together(replace(config, memory__monitor_every=5, **changes), run_dir, count, devices)

    return build


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The folder of the run on one process of four devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command(folder, 1, 4).finish()
    return folder


def losses(folder):
    """By step: the training loss, or the validation loss."""
    lines = [line for line in numbers(folder) if "loss" in line or "validation_loss" in line]
    return {(line["step"], "loss" in line): line.get("loss", line.get("validation_loss")) for line in lines}


def assert_same_losses(folder, expected, abs=1e-4):
    """To rounding: sums over the devices are taken in another order."""
    assert losses(folder) == pytest.approx(losses(expected), rel=0, abs=abs)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def is_saving_another(folder):
    """A checkpoint is there and the next is half written."""
    return {UNFINISHED in name for name in checkpoints(folder)} == {True, False}


def test_two_and_four_processes_train_as_one(command, alone, tmp_path):
    for count in (2, 4):
        out = command(tmp_path / str(count), count, 4 // count).finish()
        assert f"{count} processes, as given" in out
        assert_same_losses(tmp_path / str(count), alone)
    assert numbers(tmp_path / "2") == numbers(tmp_path / "4")
    assert not list(tmp_path.glob("*/*.probe"))


def test_sigterm_to_one_stops_all_and_any_number_goes_on(command, alone, tmp_path):
    two = command(tmp_path / "two", 2, 2)
    with two.started() as processes:
        two.wait_for("step  6/12", processes)
        processes[1].send_signal(signal.SIGTERM)
        assert two.wait(processes) == [TERMINATED] * 2, two.said()
    assert "saved. The same command continues from here." in two.said(0)
    assert "ended before" not in two.said()
    step = int(checkpoints(two.folder)[-1])
    assert 6 <= step < 12 and len(numbers(two.folder)) >= step
    for count, devices in ((1, 2), (4, 1)):
        folder = shutil.copytree(two.folder, tmp_path / str(count))
        assert f"Resumed at step {step} of 12." in command(folder, count, devices).finish()
        assert_same_losses(folder, alone, abs=1e-3)


@pytest.mark.parametrize(("moment", "victim"), [("step  5/12", 1), ("while saving", 0)])
def test_kill_9_of_one_ends_the_other_and_the_run_goes_on(command, alone, tmp_path, moment, victim):
    pair = command(tmp_path / "run", 2, 2, checkpoint__every=2)
    with pair.started() as processes:
        if moment == "while saving":
            pair.wait_for("step  3/12", processes)
            while not is_saving_another(pair.folder):
                assert all(process.poll() is None for process in processes), pair.said()
        else:
            pair.wait_for(moment, processes)
        processes[victim].kill()
        statuses = pair.wait(processes)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] not in (0, 1, 2), pair.said()
    assert pair.said(1 - victim).splitlines()[-1].endswith(GOES_ON)
    assert "Resumed at step" in pair.finish()
    assert_same_losses(pair.folder, alone)


def test_a_mistake_is_a_mistake_on_all(command, tmp_path):
    pair = command(tmp_path / "run", 2, 2, data__batch_size=6)
    with pair.started() as processes:
        assert pair.wait(processes) == [MISTAKEN] * 2, pair.said()
    for said in (pair.said(0), pair.said(1)):
        assert said.splitlines()[-1].startswith("error: data.batch_size=6")
    assert not pair.folder.exists()
