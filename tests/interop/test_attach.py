"""attach: the config it makes of a backbone's, and a whole run of it by its command line."""

import json

import jax
import numpy as np
import pytest
from interop_run import CONFIG, make_run

from engram_jax.commands.attach import MEMORY_SHARE, attached, default_memory, main
from engram_jax.config import ConfigError, EngramConfig, replace, to_dict
from engram_jax.counts import parameters
from engram_jax.runs.load import load_run
from engram_jax.training.metrics import read_metrics
from experiments.runs.registry import build


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("runs") / "backbone"
    folder.mkdir()
    return make_run(folder, replace(CONFIG, model__engram=EngramConfig()), tokenizer_file, devices=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(7)
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["value", "import", "self", "(", ")", "none"], 80)))
    return folder


@pytest.mark.slow
def test_attached_memory_is_silent_then_learns_alone(backbone, corpus, tmp_path, capsys):
    options = {
        "--run_dir": tmp_path / "new",
        "--data.corpus": corpus,
        "--data.cache_dir": tmp_path / "cache",
        "--train.steps": 3,
        "--train.eval_batches_final": 1,
        "--train.tensorboard": False,
        "--train.mesh_fsdp": 8,
        "--data.batch_size": 8,
        "--model.engram.engram_vocab_size": 53,
        "--memory.monitor_every": 0,
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert main([str(backbone.folder), "with_memory", *words]) == 0
    assert f"Begins with step 7 of {backbone.folder}: parameters." in capsys.readouterr().out
    begun, *_, last = [line for line in read_metrics(tmp_path / "new") if "validation_loss" in line]
    assert (begun["step"], last["step"]) == (0, 3)
    assert begun["validation_loss"] != last["validation_loss"]

    state, parts = load_run(tmp_path / "new")
    assert parts.config.name == "with_memory" and parts.config.model.engram.engram_vocab_size == 53
    assert int(state.memory.rows_used["1"]) > 0
    params = jax.device_get(state.params)
    for name in ("embedding_vd", "head_dv", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, params[name], jax.device_get(backbone.state.params[name]))
    stacks = [params["blocks"][name] for name in sorted(params["blocks"])]
    ours = jax.tree.map(lambda *x: np.concatenate(x), *stacks[1:])
    theirs = jax.device_get(backbone.state.params["blocks"]["01-02"])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    rows, uses = np.asarray(state.memory.tables["1"].rows), np.asarray(state.memory.tables["1"].uses)
    np.testing.assert_array_equal(np.any(rows, axis=1), uses > 0)  # zero, and so silent, where nothing was learnt


def test_default_memory_has_the_papers_proportions():
    for name in ("moe_tiny", "moe_small", "moe_27b"):
        source = build(name)
        engram = default_memory(source.model)
        size = parameters(source.model).total
        table = parameters(replace(source.model, engram=engram)).groups["memory"]
        np.testing.assert_allclose(table / size, MEMORY_SHARE, rtol=0.02)
    assert engram.engram_layer_ids == (1, 14)
    assert engram.memory_dim == 1280


def test_refusals(tmp_path, capsys):
    with pytest.raises(ConfigError, match="has a memory already"):
        attached(CONFIG, tmp_path, "x")
    plain = replace(CONFIG, model__engram=EngramConfig())
    assert "head_dv" in attached(plain, tmp_path, "x").optimizer.frozen
    tied = replace(plain, model__tie_word_embeddings=True)
    assert "head_dv" not in attached(tied, tmp_path, "x").optimizer.frozen
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text(json.dumps(to_dict(plain)))
    for arguments, says in (
        ([str(tmp_path), "x"], "is not a run"),
        ([str(backbone)], "a name for the new run"),
        ([str(backbone), "--train.steps", "3"], "a name for the new run"),
        ([str(backbone), "x", "--run_dir", str(backbone)], "is the backbone's own"),
        ([str(backbone), "x", "--trian.steps", "3"], "nearest is '--train.steps'"),
    ):
        assert main(arguments) == 2
        assert says in capsys.readouterr().err
    assert main([str(backbone), "x", "--print"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.index("\n}\n") + 2])["train"]["init_from"] == str(backbone)
    assert main([str(backbone), "x", "--slice", "v5p-8", "--data.batch_size", "16", "--print"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.index("\n}\n") + 2])["train"]["mesh_fsdp"] == 8
    (backbone / "config.json").write_text("")
    assert main([str(backbone), "x"]) == 2
    assert "config.json cannot be read as the settings of a run" in capsys.readouterr().err
