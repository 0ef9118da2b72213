"""Looks at the memory between steps and in whole runs."""

import functools
import itertools
import math
import shutil

import jax
import numpy as np
import pytest
from commands import numbers
from monitored_model import CONFIG, B, T, make_batch, on_devices

from engram_jax.config import (
    CheckpointConfig,
    DataConfig,
    TrainConfig,
    replace,
)
from engram_jax.runs.parts import assemble
from engram_jax.training.loop import train
from engram_jax.training.stepper import Stepper

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def stepped(tokenizer):
    """`stepped(placement)`: losses of five steps and three looks between them."""

    def run(placement):
        config = replace(CONFIG, memory__placement=placement, model__engram__engram_layer_ids=(0,), model__hc_mult=1)
        parts = assemble(config, tokenizer, jax.devices()[:1])
        batches = (on_devices(parts, make_batch(seed)) for seed in itertools.count())
        losses, looks = [], []
        with jax.set_mesh(parts.mesh), Stepper(parts, batches) as stepper:
            state = parts.init_state()
            for step in range(5):
                if step in (0, 3, 4):
                    looks.append(stepper.look(state))
                state, metrics = stepper(state, step)
                losses.append(float(metrics["loss"]))
        return losses, [{name: float(x) for name, x in seen.items()} for seen in looks]

    return functools.cache(run)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["numpy", "host"])
def test_every_placement_sees_the_same(stepped, placement):
    """While rows are read ahead and written behind; what the steps see is not disturbed by it."""
    losses, looks = stepped(placement)
    device_losses, device_looks = stepped("device")
    np.testing.assert_allclose(losses, device_losses, rtol=1e-6)
    for seen, on_device in zip(looks, device_looks, strict=True):
        assert seen.keys() == on_device.keys()
        for name, value in seen.items():
            np.testing.assert_allclose(value, on_device[name], rtol=1e-4, err_msg=name)


def test_a_memory_fills_between_looks(stepped):
    _, (first, third, fourth) = stepped("device")
    assert math.isnan(first["memory/staleness_0/max"]) and first["memory/collision_0/order2"] == 0
    assert math.isnan(first["memory/gate_0/seen_1_3_mean"]) and not math.isnan(first["memory/gate_0/seen_0_mean"])
    assert third["memory/staleness_0/max"] == 2 and fourth["memory/staleness_0/max"] == 3
    assert 0 < third["memory/collision_0/order3"] != fourth["memory/collision_0/order3"]


def test_without_memory_there_is_nothing_to_see(tokenizer):
    parts = assemble(replace(CONFIG, model__engram__engram_layer_ids=()), tokenizer, jax.devices()[:1])
    with jax.set_mesh(parts.mesh), Stepper(parts, iter(())) as stepper:
        assert stepper.look(parts.init_state()) == {}


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """A run of 8 steps with a checkpoint at 4."""
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdefghijkl"), rng.integers(2, 8))) for _ in range(100)]
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(100):
        (folder / f"{i:03d}.txt").write_text(" ".join(rng.choice(words, 30)) + f" {i}\n")
    return replace(
        CONFIG,
        model__num_hidden_layers=1,
        model__hc_mult=1,
        model__engram__engram_layer_ids=(0,),
        data=DataConfig(
            corpus=str(folder),
            cache_dir=str(tmp_path_factory.mktemp("cache")),
            seq_len=T,
            batch_size=B,
            holdout_fraction=0.1,
        ),
        train=TrainConfig(steps=8, log_every=2, eval_every=0, eval_batches_final=1, tensorboard=False),
        checkpoint=CheckpointConfig(every=4),
        memory__monitor_every=3,
    )


def is_monitored(name):
    return name.startswith(("memory/collision_", "memory/gate_", "memory/staleness_"))


@pytest.fixture(scope="module")
def seen_run(run_config, tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("seen"), []
    train(run_config, folder, lines.append)
    return folder, lines


@pytest.mark.slow
def test_a_run_writes_its_looks_and_trains_as_without(run_config, seen_run, tmp_path):
    folder, log = seen_run
    seen = {line["step"]: {k: v for k, v in line.items() if is_monitored(k)} for line in numbers(folder)}
    assert [step for step, values in seen.items() if values] == [3, 6]  # 3 is no step of log_every
    for values in (seen[3], seen[6]):
        assert all(math.isfinite(x) for x in values.values())
        assert not [name for name in values if "seen_64_up" in name]  # an empty bucket is left out
        assert {"memory/collision_0/order3", "memory/gate_0/stream0_std", "memory/staleness_0/mean"} <= values.keys()
    assert not [line for line in log if "collision" in line]
    train(replace(run_config, memory__monitor_every=0), tmp_path, lambda line: None)
    rest = [{k: v for k, v in line.items() if not is_monitored(k)} for line in numbers(folder)]
    assert [line for line in rest if line != {"step": 3}] == numbers(tmp_path)


@pytest.mark.slow
def test_a_resumed_run_sees_the_same(run_config, seen_run, tmp_path):
    folder = shutil.copytree(seen_run[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "8")
    (folder / "result.json").unlink()
    lines = []
    train(run_config, folder, lines.append)
    assert "Resumed at step 4 of 8." in lines
    assert [line for line in numbers(folder) if line["step"] != 5] == numbers(seen_run[0])
