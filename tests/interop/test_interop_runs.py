"""A run out to safetensors and back, read and written by the safetensors library as well."""

import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engram_jax.commands import export
from engram_jax.commands import import_run as import_command
from engram_jax.config import ConfigError
from engram_jax.errors import RunError
from engram_jax.interop import runs, shards
from engram_jax.interop.runs import export_run, import_run
from engram_jax.runs.load import load_run
from engram_jax.runs.run_folder import check_meta

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """In files of about 4 kB, so that there are many."""
    folder = tmp_path_factory.mktemp("hf") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "write", lambda *args: shards.write(*args, shard_bytes=4096))
        export_run(run.folder, folder, log=lambda _: None)
    return folder


def read_all(folder):
    """By the library alone."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {file: safetensors.numpy.load_file(folder / file) for file in set(index.values())}
    assert {name for tensors in files.values() for name in tensors} == set(index)
    return {name: files[file][name] for name, file in index.items()}


@pytest.fixture(scope="module")
def tensors(exported):
    return read_all(exported)


def test_float32_round_trip_is_bit_equal(run, exported, tmp_path):
    import_run(exported, tmp_path / "back", log=lambda _: None)
    state, parts = load_run(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, state.params, run.state.params)
    jax.tree.map(np.testing.assert_array_equal, state.buffers, run.state.buffers)
    assert int(state.step) == int(run.state.step)
    assert jax.tree.map(int, state.memory.rows_used) == {"1": 3, "2": 4}
    assert parts.store.constants == run.parts.store.constants
    with jax.set_mesh(parts.mesh):
        tables = parts.store.materialize(state.memory, state.step)
    for layer, rows in run.tables().items():
        np.testing.assert_array_equal(tables[layer], rows)
        stored = np.asarray(run.state.memory.tables[layer].rows)
        assert not np.isin(rows, stored).all()  # rows were caught up: bit equality is not that of files
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (run.folder / "config.json").read_text()
    )


def test_layouts_as_documented(run, tensors):
    """Every kind of tensor against its definition, written out by hand."""
    params, block = run.state.params, run.state.params["blocks"]["02-02"]
    model = run.parts.config.model
    a = model.attention

    def ours(x, index=0):
        return np.asarray(x)[index]

    def same(name, expected):
        np.testing.assert_array_equal(tensors[f"model.layers.2.{name}"], expected)

    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embedding_vd"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], np.asarray(params["head_dv"]).T)
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["final_norm"]["gain"])
    same("input_layernorm.weight", ours(block["attn_norm"]["gain"]))
    same("post_attention_layernorm.weight", ours(block["ffn_norm"]["gain"]))
    same("self_attn.kv_a_layernorm.weight", ours(block["attn"]["kv_norm"]["gain"]))
    kv_up = ours(block["attn"]["kv_up_rnh"])
    same("self_attn.kv_b_proj.weight", kv_up.reshape(a.kv_lora_rank, -1).T)
    same("self_attn.o_proj.weight", ours(block["attn"]["o_nhd"]).reshape(-1, model.hidden_size).T)
    same("mlp.gate.weight", ours(block["ffn"]["router_de"]).T)
    same("mlp.gate.e_score_correction_bias", ours(run.state.buffers["blocks"]["02-02"]["ffn"]["balance_bias"]))
    for e in range(model.moe.n_routed_experts):
        same(f"mlp.experts.{e}.gate_proj.weight", ours(block["ffn"]["gate_edf"])[e].T)
        same(f"mlp.experts.{e}.up_proj.weight", ours(block["ffn"]["up_edf"])[e].T)
        same(f"mlp.experts.{e}.down_proj.weight", ours(block["ffn"]["down_efd"])[e].T)
    same("mlp.shared_experts.up_proj.weight", ours(block["ffn"]["shared"]["up_df"]).T)
    hc = block["attn_hc"]
    phi = np.concatenate([ours(hc[f"phi_{part}_cm"]) for part in ("pre", "post", "res")], axis=1)
    same("hc_attn_fn", phi.T)
    same("hc_attn_base", np.concatenate([ours(hc[f"bias_{part}"]).ravel() for part in ("pre", "post", "res")]))
    same("hc_attn_scale", ours(hc["alpha"]))
    reader = params["engram"]["2"]
    key_value = np.asarray(reader["key_value_emd"])
    same("engram.wkv.weight", np.concatenate([key_value[:, m].T for m in range(key_value.shape[1])]))
    same("engram.q_weight", reader["query_norm"])
    same("engram.k_weight", reader["key_norm"])
    conv = np.asarray(reader["conv_kmd"])
    same("engram.conv1d.weight", conv.reshape(len(conv), -1).T[:, None])
    same("engram.embed.weight", run.tables()["2"])
    dense = run.state.params["blocks"]["00-00"]["ffn"]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], ours(dense["down_fd"]).T)


def test_bfloat16_rounds_to_nearest_and_spares_what_is_computed_in_float32(run, tensors, tmp_path):
    assert export.main([str(run.folder), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = read_all(tmp_path / "half")
    assert set(half) == set(tensors)
    for name, exact in tensors.items():
        if "hc_" in name or "e_score_correction_bias" in name:
            np.testing.assert_array_equal(half[name], exact)
        else:
            np.testing.assert_array_equal(half[name], exact.astype(ml_dtypes.bfloat16))
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert (config["dtype"], config["rope_interleave"]) == ("bfloat16", True)
    import_run(tmp_path / "half", tmp_path / "back", log=lambda _: None)
    state, _ = load_run(tmp_path / "back")
    rounded = np.asarray(run.state.params["embedding_vd"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(state.params["embedding_vd"], rounded)


def test_table_is_written_in_chunks(run, exported, monkeypatch):
    """No chunk is the table, and chunks of any size give the same rows."""
    sizes = []
    monkeypatch.setattr(runs, "rows_per_chunk", lambda fields: 50)

    def write(folder, sources, texts):
        (table,) = [source for source in sources if source.name == "model.layers.1.engram.embed.weight"]
        found = list(table.chunks())
        sizes.extend(len(chunk) for chunk in found)
        np.testing.assert_array_equal(np.concatenate(found), run.tables()["1"])
        return []

    monkeypatch.setattr(runs, "write", write)
    export_run(run.folder, exported, log=lambda _: None)
    num_rows = run.parts.store.num_rows("1")
    assert sizes == [50] * (num_rows // 50) + [num_rows % 50]


def test_folder_written_by_the_library_is_read(run, exported, tensors, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(exported / name, folder / name)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    import_run(folder, tmp_path / "back", log=lambda _: None)
    state, _ = load_run(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, state.params, run.state.params)


def test_imported_run_is_not_continued(run, exported, tmp_path):
    import_run(exported, tmp_path / "back", log=lambda _: None)
    meta = json.loads(next((tmp_path / "back/checkpoints").glob("*/meta/metadata")).read_text())
    with pytest.raises(RunError, match=r"imported from .*no optimizer state.*train\.init_from"):
        check_meta(meta, meta, run.parts)


# --- damage: each must be named, with its file and tensor, and leave nothing behind ---


def table_file(folder):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"]["model.layers.1.engram.embed.weight"]


def truncated(folder):
    path = table_file(folder)
    path.write_bytes(path.read_bytes()[:-100])


def header_only(folder):
    path = table_file(folder)
    path.write_bytes(path.read_bytes()[:20])


def pointer(folder):
    table_file(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def garbled(folder):
    path = table_file(folder)
    path.write_bytes(struct.pack("<Q", 40) + b"x" * 200)


def longer(folder):
    path = table_file(folder)
    path.write_bytes(path.read_bytes() + b"more")


def rewritten(change):
    def damage(folder):
        path = table_file(folder)
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return damage


def with_tensor(name, change):
    return rewritten(lambda tensors: tensors.update({name: change(tensors.get(name))}))


def edited_block(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["engram_jax"]["run"]["model"]["hidden_size"] = 32
    path.write_text(json.dumps(config))


def other_tokenizer(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["V"], vocab["("] = vocab["("], vocab["V"]  # V is one canonical id with v
    path.write_text(json.dumps(tokenizer))


TABLE = "model.layers.1.engram.embed.weight"
DAMAGE = {
    "cut short": (truncated, RunError, rf"{TABLE} is cut short"),
    "cut in the header": (header_only, RunError, rf"ends within its header.*{TABLE}"),
    "missing": (lambda folder: table_file(folder).unlink(), RunError, rf"is missing.*{TABLE}"),
    "git lfs pointer": (pointer, RunError, r"Git LFS pointer.*git lfs pull"),
    "garbled header": (garbled, RunError, r"safetensors has no readable header"),
    "longer than its header says": (longer, RunError, r"is damaged"),
    "tensor missing": (
        rewritten(lambda t: (t.pop(TABLE), t.update(x=np.zeros(1)))),
        RunError,
        rf"has no tensor {TABLE}",
    ),
    "table of another size": (with_tensor(TABLE, lambda x: x[:-1]), RunError, rf"{TABLE} has shape .*config\.json"),
    "unknown tensor": (with_tensor("extra.weight", lambda _: np.zeros(3)), RunError, r"without extra\.weight"),
    "unknown dtype": (with_tensor("odd", lambda _: np.zeros(3, bool)), ConfigError, r"odd has dtype BOOL"),
    "index missing": (lambda folder: (folder / INDEX).unlink(), RunError, rf"no {INDEX}"),
    "index cut short": (lambda folder: (folder / INDEX).write_text('{"weight'), RunError, r"is not JSON"),
    "config missing": (lambda folder: (folder / "config.json").unlink(), ConfigError, r"no config\.json"),
    "another's config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "deepseek_v41"}'),
        ConfigError,
        r"no engram_jax block.*deepseek_v41",
    ),
    "config of another model": (edited_block, RunError, r"model\.embed_tokens\.weight has shape \[300, 16\]"),
    "another tokenizer": (other_tokenizer, RunError, r"every row would be wrong"),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), ConfigError, r"no tokenizer\.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(exported, tmp_path, name):
    damage, error, message = DAMAGE[name]
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        import_run(folder, tmp_path / "back", log=lambda _: None)
    assert str(raised.value).count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_command_reports_in_one_line(exported, tmp_path, capsys):
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    truncated(folder)
    assert import_command.main([str(folder), str(tmp_path / "back")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert export.main([str(tmp_path), str(tmp_path / "new")]) == 1  # no run
    assert export.main([str(tmp_path), str(folder)]) == 1


def test_existing_folder_is_kept(run, exported, tmp_path):
    before = sorted(path.stat().st_mtime_ns for path in exported.iterdir())
    with pytest.raises(ConfigError, match="is there already"):
        export_run(run.folder, exported, log=lambda _: None)
    assert sorted(path.stat().st_mtime_ns for path in exported.iterdir()) == before
    (tmp_path / "back").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        import_run(exported, tmp_path / "back")


def test_failed_export_leaves_nothing(run, tmp_path, monkeypatch):
    def rows(*_):
        yield np.zeros((1, 8), np.float32)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "_rows", rows)
    with pytest.raises(OSError, match="No space"):
        export_run(run.folder, tmp_path / "hf", log=lambda _: None)
    assert not list(tmp_path.iterdir())
