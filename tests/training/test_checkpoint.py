"""Checkpoints: what is kept, what is skipped by name, and what is refused, with a state of two arrays."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.config import CheckpointConfig, ConfigError, EngramConfig
from engram_jax.errors import RunError
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import MemoryState
from engram_jax.memory.row_optimizers import DenseAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.runs.checkpoint import UNFINISHED, Checkpoints
from engram_jax.runs.state import TrainState
from engram_jax.sharding import make_mesh

STORE = MemoryStore.create(EngramConfig(), TokenMap.identity(10), DenseAdam(np.ones(1)))


def parts_on(mesh=None):
    return SimpleNamespace(store=STORE, mesh=mesh or make_mesh(devices=jax.devices()[:1]))


def state_of(step):
    weights = {"weights": jax.random.normal(jax.random.key(step), (8, 600))}
    return TrainState(jnp.int32(step), weights, {}, {}, MemoryState({}, {}))


def save(directory, *steps, keep=5):
    with Checkpoints(directory, CheckpointConfig(keep=keep), parts_on()) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"name": f"run at {step}"})
        checkpoints.wait()
        return checkpoints.steps


def restore(directory, check=lambda meta: None, **options):
    """(step restored, lines logged)."""
    lines = []
    with Checkpoints(directory, CheckpointConfig(), parts_on(), lines.append, **options) as checkpoints:
        state = checkpoints.restore(jax.eval_shape(lambda: state_of(0)), check)
    if state is None:
        return None, lines
    np.testing.assert_array_equal(state.params["weights"], state_of(int(state.step)).params["weights"])
    return int(state.step), lines


def files(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def test_the_newest_comes_back_and_old_ones_go(tmp_path):
    assert restore(tmp_path) == (None, [])
    assert save(tmp_path, 3, 5, 9, keep=2) == [5, 9]
    metas = []
    assert restore(tmp_path, metas.append) == (9, [])
    assert metas == [{"name": "run at 9"}]


def test_saving_a_step_twice_is_saving_it_once(tmp_path):
    assert save(tmp_path, 4, 4) == [4]


def test_a_state_is_restored_to_another_mesh(tmp_path):
    with jax.set_mesh(make_mesh(fsdp=4)):
        sharded = jax.tree.map(lambda x: jax.device_put(x, P("fsdp") if x.ndim else P()), state_of(2))
        with Checkpoints(tmp_path, CheckpointConfig(), parts_on()) as checkpoints:
            checkpoints.save(2, sharded, {})
    assert restore(tmp_path)[0] == 2
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, "fsdp") if x.ndim else P())
            ),
            state_of(2),
        )
        with Checkpoints(tmp_path, CheckpointConfig(), parts_on()) as checkpoints:
            state = checkpoints.restore(abstract, lambda meta: None)
    weights = state.params["weights"]
    assert weights.sharding.spec == P(None, "fsdp") and len(weights.addressable_shards) == 2
    np.testing.assert_array_equal(jax.device_get(weights), state_of(2).params["weights"])


def test_a_half_written_checkpoint_is_named_and_skipped(tmp_path):
    save(tmp_path, 3, 7)
    shutil.copytree(tmp_path / "7", tmp_path / f"9{UNFINISHED}-123")
    step, lines = restore(tmp_path)
    assert step == 7
    assert lines == ["Checkpoint 9 was only half written when the run ended: skipped."]
    assert save(tmp_path, 9) == [3, 7, 9]


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, harm):
    """Whichever of its files was harmed: the state is never a wrong one, and the run can save again."""
    intact = tmp_path / "intact"
    save(intact, 3, 7)
    skipped = []
    for i, file in enumerate(files(intact / "7")):
        copy = shutil.copytree(intact, tmp_path / str(i))
        path = copy / "7" / file
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if harm == "truncated" else 0])
        step, lines = restore(copy)
        if step == 7:  # a file that reading does not need
            assert lines == []
            continue
        assert step == 3 and len(lines) == 1 and lines[0].startswith("Checkpoint 7 cannot be read (")
        skipped.append(copy)
    assert len(skipped) >= 3
    assert save(skipped[0], 5, 7) == [3, 5, 7]
    assert restore(skipped[0]) == (7, [])


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_readable_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 3, 7)
    for step in ("3", "7"):
        for file in files(tmp_path / step):
            (tmp_path / step / file).write_bytes(b"")
    with pytest.raises(RunError, match=r"No checkpoint in .* can be read \(7: .*; 3: .*\)\. Restore the folder"):
        restore(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"3", "7"}


def test_a_refusal_is_not_taken_for_damage(tmp_path):
    save(tmp_path, 3, 7)

    def refuse(meta):
        raise ConfigError(f"not {meta['name']}")

    with pytest.raises(ConfigError, match=r"^not run at 7$"):
        restore(tmp_path, refuse)
    assert restore(tmp_path)[0] == 7


def test_a_full_disk_is_said_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=8 * 600 * 4))
    with pytest.raises(RunError, match=r"has 0\.00 GB free .* The last complete checkpoint is step 3\. Free"):
        save(tmp_path, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=8 * 600 * 4 + 4))
    assert save(tmp_path, 5) == [3, 5]


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_disturbs_nothing(tmp_path):
    """Sampling from a run that is saving just now: its unfinished checkpoint must survive."""
    save(tmp_path, 3, 7)
    writing = tmp_path / f"9{UNFINISHED}-123"
    shutil.copytree(tmp_path / "7", writing)
    for file in files(tmp_path / "7"):
        (tmp_path / "7" / file).write_bytes(b"")
    before = files(tmp_path)
    step, lines = restore(tmp_path, read_only=True)
    assert step == 3 and len(lines) == 1
    assert files(tmp_path) == before
