"""What a run leaves behind, and how it says that it cannot go on."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import ConfigError, RunConfig, from_dict, replace
from engram_jax.data.loader import load_data
from engram_jax.errors import RunError
from engram_jax.runs.load import load_run
from engram_jax.training import stepper
from engram_jax.training.loop import train
from engram_jax.training.metrics import read_metrics


@pytest.fixture
def folder(straight, tmp_path):
    """A copy of the finished run, to be harmed."""
    return shutil.copytree(straight.folder, tmp_path / "run")


def test_the_folder_holds_the_run(straight, config):
    run_dir, result = straight.folder, straight.result
    saved = from_dict(RunConfig, json.loads((run_dir / "config.json").read_text()))
    assert saved == result.parts.config
    assert replace(saved, model__engram__engram_compressed_vocab_size=0) == config
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["12", "8"]
    outcome = json.loads((run_dir / "result.json").read_text())
    assert (outcome["name"], outcome["step"], outcome["loss"]) == ("engram_tiny", 12, result.evaluation.loss)
    assert not (run_dir / "tensorboard").exists()


def test_metrics_are_complete_and_the_loss_falls(straight):
    lines = read_metrics(straight.folder)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "expert_load_max"} <= set(training[0])
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    assert [step for step, _ in validation] == [5, 10, 12]
    assert training[-1]["loss"] < training[0]["loss"] - 0.5 and validation[-1][1] < validation[0][1]
    assert validation[-1][1] == straight.result.evaluation.loss


def test_the_log_says_what_happens(straight):
    log = "\n".join(straight.lines)
    for said in ("Corpus", "Run engram_tiny in", "step  1/12  loss 5.", "ETA", "step 5  validation loss", "Done: "):
        assert said in log


def test_a_finished_run_is_only_evaluated_again(straight, config, folder):
    lines = []
    again = train(config, folder, lines.append)
    assert "All 12 steps are done already: only the evaluation is repeated." in lines
    assert again.evaluation == straight.result.evaluation
    assert read_metrics(folder) == read_metrics(straight.folder)
    assert not [line for line in lines if line.startswith("step")]


def test_a_finished_run_can_be_loaded_alone(straight):
    state, parts = load_run(straight.folder)
    assert parts.mesh.size == 1
    layouts, saved = straight.result.parts.store.layouts, straight.state.memory
    tables = {la: jax.tree.map(layouts[la].to_logical, table) for la, table in saved.tables.items()}
    trained = dataclasses.replace(straight.state, memory=dataclasses.replace(saved, tables=tables))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), trained)


def test_what_cannot_be_loaded(tmp_path, straight):
    with pytest.raises(RunError, match=r"is not a run: it has no config\.json"):
        load_run(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(straight.folder / name, tmp_path / name)
    with pytest.raises(RunError, match="has no checkpoint yet"):
        load_run(tmp_path)


@pytest.mark.parametrize("with_config_json", [True, False], ids=["config.json", "checkpoint"])
def test_a_run_of_other_settings_is_refused(config, folder, with_config_json):
    other = replace(config, model__hidden_size=64, train__seed=5, train__log_every=7)
    if not with_config_json:
        (folder / "config.json").unlink()
    with pytest.raises(ConfigError) as error:
        train(other, folder)
    message = str(error.value)
    assert "model.hidden_size: 64 here, 32 there; train.seed: 5 here, 0 there" in message
    assert "log_every" not in message and "run_dir" in message
    assert (folder / "config.json").exists() == with_config_json


def edit_meta(folder, edit):
    for path in (folder / "checkpoints").glob("*/meta/metadata"):
        meta = json.loads(path.read_text())
        edit(meta)
        path.write_text(json.dumps(meta))


def test_a_checkpoint_newer_than_the_code_is_refused(config, folder):
    edit_meta(folder, lambda meta: meta.update(format=7, version="9.9", config={"of": "the future"}))
    (folder / "config.json").unlink()
    lines = []
    with pytest.raises(RunError, match=r"written by engram_jax 9\.9 in format 7, and this is \d.* up to 1: use that"):
        train(config, folder, lines.append)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "8"]


@pytest.mark.parametrize("what", ["tokenizer", "corpus"])
def test_another_tokenizer_or_corpus_is_refused(config, folder, what):
    edit_meta(folder, lambda meta: meta.update({f"{what}_sha256": "0" * 64}))
    (folder / "tokenizer.json").write_text("what the run was trained with")
    with pytest.raises(RunError, match=rf"The {what} is not the one this run was .* 000000000000 in the checkpoint"):
        train(config, folder)
    assert (folder / "tokenizer.json").read_text() == "what the run was trained with"


def test_other_hash_constants_are_refused(config, folder):
    edit_meta(folder, lambda meta: change_a_number(meta["hash_constants"]))
    for start in (lambda: train(config, folder), lambda: load_run(folder)):
        with pytest.raises(RunError, match="memory was addressed otherwise"):
            start()


def change_a_number(tree):
    """Adds 2 to the first large number (a multiplier, say) in lists and dicts within each other."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, int) and value > 1000:
            tree[key] = value + 2
            return True
        if isinstance(value, dict | list) and change_a_number(value):
            return True
    return False


def test_a_full_disk_is_said_at_the_start(config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    lines = []
    with pytest.raises(RunError, match=r"has 0\.00 GB free and a checkpoint takes .* There is no complete checkpoint"):
        train(config, tmp_path / "run", lines.append)
    assert not [line for line in lines if line.startswith("step")]


@pytest.mark.parametrize("metric", ["loss", pytest.param("grad_norm", marks=pytest.mark.slow)])
def test_a_number_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch, metric):
    def make_train_step(parts):
        step, calls = original(parts), iter(range(1, 100))

        def train_step(*args):
            state, metrics, held = step(*args)
            return state, metrics | ({metric: jnp.sqrt(-metrics[metric])} if next(calls) == 6 else {}), held

        return train_step

    original = stepper.make_train_step
    monkeypatch.setattr(stepper, "make_train_step", make_train_step)
    with pytest.raises(RunError, match=rf"^Step 6: {metric} is nan, .*; checkpoint 4 is the last good one\. Lower"):
        train(replace(config, train__log_every=100), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_a_step_is_reported_while_the_next_one_runs(config, tmp_path, monkeypatch):
    """The order of events: no step waits for the numbers of the one before it."""
    events = []

    def make_train_step(parts):
        step = original(parts)

        def train_step(*args):
            events.append("dispatch")
            return step(*args)

        return train_step

    original = stepper.make_train_step
    monkeypatch.setattr(stepper, "make_train_step", make_train_step)
    quiet = replace(config, train__eval_every=0, checkpoint__every=0)
    train(quiet, tmp_path, lambda line: events.append("report") if line.startswith("step") else None)
    assert events == ["dispatch", *["dispatch", "report"] * 11, "report"]


def test_the_old_state_is_donated_and_no_transfer_goes_unseen(config, tmp_path, monkeypatch):
    def make_train_step(parts):
        step, calls = original(parts), iter(range(100))

        def train_step(state, *args):
            call = next(calls)
            result = step(state, *args)
            kept.append([jax.tree_util.keystr(path) for path, x in leaves(state) if not x.is_deleted()])
            if call == 2:
                result[1]["loss"] * 2.0  # the 2.0 is sent to the devices
            return result

        return train_step

    kept, leaves = [], jax.tree_util.tree_leaves_with_path
    original = stepper.make_train_step
    monkeypatch.setattr(stepper, "make_train_step", make_train_step)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(replace(config, memory__monitor_every=2), tmp_path)
    assert kept == [[], [], []]


def test_a_mistake_is_said_before_anything_is_compiled(config, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batch_size=12"):
        train(replace(config, data__batch_size=12), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "said"), [(1, None), (300, "Epochs: "), (2000, "warning: 512,000 tokens are asked")])
def test_text_seen_more_than_once_is_told_before_anything_is_compiled(config, tmp_path, monkeypatch, steps, said):
    def assemble(*_):
        raise RunError("far enough")

    monkeypatch.setattr("engram_jax.training.loop.assemble", assemble)
    lines: list[str] = []
    with pytest.raises(RunError, match="far enough"):
        train(replace(config, train__steps=steps), tmp_path / "run", lines.append)
    told = [line for line in lines if "the run sees" in line]
    assert len(told) == (said is not None) and all(line.startswith(str(said)) for line in told)


def test_the_tokenizers_size_must_be_the_models(config, straight):
    pinned = replace(config, data__tokenizer=str(straight.folder / "tokenizer.json"), model__vocab_size=299)
    with pytest.raises(ConfigError, match=r"model.vocab_size=299, but .* has 300 tokens: set model.vocab_size=300"):
        load_data(pinned.data, 299)
