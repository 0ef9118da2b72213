"""A run that begins with another's checkpoint: what it takes over, what is new, what stays frozen, what is refused."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from engram_jax.config import CheckpointConfig, ConfigError, EngramConfig, YarnConfig, replace, to_dict
from engram_jax.data.tokenizer import train_tokenizer
from engram_jax.errors import RunError
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.load import load_run
from engram_jax.runs.parts import assemble
from engram_jax.runs.run_folder import meta
from engram_jax.sharding import spec
from engram_jax.training.init_from import find_source, initial_state
from engram_jax.training.loop import train
from engram_jax.training.planner import Planner
from engram_jax.training.step import make_eval_step, make_train_step

pytestmark = pytest.mark.newest

BACKBONE = ("blocks.*", "embedding_vd", "head_dv", "final_norm.*")
STRETCHED = YarnConfig(factor=4.0, original_max_position_embeddings=32)


def second_stage(config, source, **changes):
    """Twice the length, YaRN, other rules for matrices and rows."""
    stage = {
        "data__seq_len": 64,
        "model__attention__yarn": STRETCHED,
        "optimizer__matrix_optimizer": "adamw",
        "optimizer__table_optimizer": "rowwise_adagrad",
        "train__steps": 3,
        "train__init_from": str(source),
    }
    return replace(config, **(stage | changes))


def begin(config, tokenizer, num_devices=2, log=print):
    """Parts and the initial state on some devices."""
    parts = assemble(config, tokenizer, jax.devices()[:num_devices])
    with jax.set_mesh(parts.mesh):
        return parts, initial_state(parts, find_source(config), tokenizer, log)


def on_devices(parts, batch):
    return jax.device_put(batch, jax.NamedSharding(parts.mesh, spec("batch", "seq")))  # type: ignore[arg-type]


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_takes_over_what_was_learnt_and_begins_anew(config, straight, row_dtype):
    own = straight.result.text.tokenizer.backend
    lines = []
    parts, state = begin(second_stage(config, straight.folder, memory__row_dtype=row_dtype), own, log=lines.append)
    assert not any("warning" in line for line in lines)
    assert int(state.step) == 0
    for name in ("params", "buffers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(straight.state, name))
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    with jax.set_mesh(straight.result.parts.mesh):
        stood = straight.result.parts.store.materialize(straight.result.state.memory, 12)["0"]
    with jax.set_mesh(parts.mesh):
        got = parts.store.materialize(state.memory, 0)["0"]
    np.testing.assert_array_equal(got, np.asarray(stood).astype(row_dtype).astype(np.float32))
    assert set(state.memory.tables["0"].slots) == {"v"}
    assert int(state.memory.rows_used["0"]) == int(straight.state.memory.rows_used["0"]) > 0
    with jax.set_mesh(parts.mesh):
        like = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), parts.abstract_state().params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state.params) == like


@pytest.mark.slow
def test_a_second_stage_trains_and_resumes_without_its_source(config, straight, tmp_path):
    """Frozen tables; the source is gone when the stage continues."""
    source = shutil.copytree(straight.folder, tmp_path / "source")
    config = second_stage(config, source, optimizer__table_optimizer="frozen", data__seq_len=32, checkpoint__every=2)
    lines = []
    whole = train(config, tmp_path / "whole", lines.append)
    assert f"Begins with step 12 of {source}: parameters and tables." in lines
    begun, first = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[:2])
    assert begun["step"] == 0 and begun["validation_loss"] > 0
    last = [json.loads(line) for line in (straight.folder / "metrics.jsonl").read_text().splitlines()]
    untrained = last[0]["loss"]
    assert abs(first["loss"] - last[-2]["loss"]) < 0.3 * (untrained - last[-2]["loss"])

    shutil.rmtree(source)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "3")
    resumed = train(config, tmp_path / "cut", lines.append)
    assert "Resumed at step 2 of 3." in lines
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), jax.device_get(whole.state))

    store, state = whole.parts.store, whole.state
    assert state.memory.tables["0"].slots == {}
    with jax.set_mesh(whole.parts.mesh):
        stood = straight.result.parts.store.materialize(straight.result.state.memory, 12)["0"]
        np.testing.assert_array_equal(store.materialize(state.memory, 3)["0"], stood)
    np.testing.assert_array_equal(np.asarray(state.memory.tables["0"].uses), straight.state.memory.tables["0"].uses)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, jax.device_get(state.params), straight.state.params)
    assert moved["engram"]["0"]["key_value_emd"] and moved["embedding_vd"]
    loaded, parts = load_run(tmp_path / "whole", lines.append)
    assert int(loaded.step) == 3 and parts.config.optimizer.table_optimizer == "frozen"


@pytest.fixture(scope="module")
def backbone(config, straight, tokenizer, tmp_path_factory):
    """The folder of a run without memory, saved at birth."""
    folder = tmp_path_factory.mktemp("backbone")
    config = replace(config, model__engram=EngramConfig(), model__num_hidden_layers=3, name="moe")
    parts = assemble(config, tokenizer, jax.devices()[:2])

    with jax.set_mesh(parts.mesh), Checkpoints(folder / "checkpoints", CheckpointConfig(), parts) as checkpoints:
        state = parts.init_state()
        checkpoints.save(7, jax.tree.map(lambda x: x, state), meta(parts.config, straight.result.text, parts))
    (folder / "config.json").write_text(json.dumps(to_dict(parts.config)))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, parts, jax.device_get(state)


def test_a_new_memory_begins_silent_and_learns_alone(config, backbone, tokenizer, make_batch, rng):
    """Blocks are cut at the new readers; losses are the backbone's; then the memory moves, and nothing else."""
    folder, theirs, old = backbone
    engram = replace(config.model.engram, engram_layer_ids=(1, 2))
    config = replace(
        config,
        model__engram=engram,
        model__num_hidden_layers=3,
        optimizer__frozen=BACKBONE,
        train__init_from=str(folder),
    )
    parts, state = begin(config, tokenizer)
    assert list(state.params["blocks"]) == ["00-00", "01-01", "02-02"]
    kept = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(list(state.params["blocks"].values())))
    jax.tree.map(np.testing.assert_array_equal, kept, old.params["blocks"]["00-02"])

    batch = make_batch(rng)
    with jax.set_mesh(theirs.mesh):
        expected = make_eval_step(theirs)(theirs.init_state(), on_devices(theirs, batch), {})
    with jax.set_mesh(parts.mesh):
        batch, planner, step = on_devices(parts, batch), Planner(parts.store), make_train_step(parts)
        np.testing.assert_allclose(make_eval_step(parts)(state, batch, planner(batch)), expected, rtol=0, atol=1e-6)

        before = jax.device_get(state)
        rows, metrics = [before.memory.tables["1"].rows], {}
        for _ in range(2):
            state, metrics, _ = step(state, batch, planner(batch))
            rows.append(jax.device_get(state.memory.tables["1"].rows))
    after = jax.device_get(state)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, before.params, after.params)
    assert all(moved["engram"][layer]["key_value_emd"] for layer in "12")
    assert not any(jax.tree.leaves({name: tree for name, tree in moved.items() if name != "engram"}))
    assert not np.any(rows[0])
    read = np.asarray(after.memory.tables["1"].uses) > 0
    assert 0 < read.sum() < len(read)
    assert np.all(np.any(rows[1][read], axis=1))  # at once
    assert not np.any(rows[2][~read])
    assert np.isfinite(rows[2]).all()
    jax.tree.map(np.testing.assert_array_equal, before.buffers, after.buffers)
    trained = sum(x.size for x in jax.tree.leaves(before.params["engram"]))
    assert sum(x.size for x in jax.tree.leaves(after.opt_state)) <= 2 * trained + 10
    assert 0 < metrics["grad_norm"] < np.inf


@pytest.mark.parametrize(
    ("yarn", "says"),
    [(YarnConfig(), "yarn.factor"), (YarnConfig(factor=4.0), "original_max_position_embeddings=4096")],
)
def test_an_odd_context_is_remarked(config, straight, yarn, says):
    own, lines = straight.result.text.tokenizer.backend, []
    begin(second_stage(config, straight.folder, model__attention__yarn=yarn), own, log=lines.append)
    assert any(line.startswith("warning: ") and says in line and "trained at 32" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__hidden_size": 64}, "model.hidden_size: 64 here, 32 there"),
        ({"model__engram__engram_seed": 1}, "model.engram.engram_seed: 1 here, 0 there"),
        ({"model__engram": EngramConfig()}, "model.engram.engram_layer_ids: [] here, [0] there"),
        ({"train__init_from": "nowhere"}, "train.init_from='nowhere' is not a run"),
    ],
)
def test_what_would_mean_nothing_is_refused_at_once(config, straight, tmp_path, changes, says):
    with pytest.raises(ConfigError) as error:
        train(second_stage(config, straight.folder, **changes), tmp_path / "run")
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_source_without_checkpoint_or_of_another_tokenizer_is_refused(config, straight, texts, tmp_path):
    (tmp_path / "config.json").write_text((straight.folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        find_source(second_stage(config, tmp_path))
    other = train_tokenizer(texts[:200], 300).backend
    with pytest.raises(ConfigError, match="another tokenizer"):
        begin(second_stage(config, straight.folder, model__engram__engram_compressed_vocab_size=0), other)


def test_an_imported_source_has_no_row_used_yet_and_a_damaged_one_is_named(config, straight, tmp_path):
    own = straight.result.text.tokenizer.backend
    source = shutil.copytree(straight.folder, tmp_path / "source")
    [saved] = (source / "checkpoints" / "12" / "meta").glob("metadata")
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"imported_from": "elsewhere"}))
    _, state = begin(second_stage(config, source), own)
    assert int(state.memory.rows_used["0"]) == 0  # its tables hold no uses, so each is counted when it is first read
    for path in (source / "checkpoints" / "12" / "tables").rglob("*.bin"):
        os.truncate(path, 0)
    with pytest.raises(RunError, match=r"train.init_from=.*: its tables cannot be read .* Restore that run"):
        begin(second_stage(config, source), own)


def test_a_pattern_that_matches_nothing_is_named(config, tokenizer):
    with pytest.raises(ConfigError, match=r"optimizer.frozen='embeding_vd' matches no parameter; .*embedding_vd"):
        assemble(replace(config, optimizer__frozen=("embeding_vd",)), tokenizer, jax.devices()[:1])
