"""The table of the paper's models: its cells are kept, and the page's own words stay."""

import pytest
from test_command import GB, played

from engram_jax.aot.chips import topology
from engram_jax.config import ConfigError, nested, replace
from experiments.pods import compile_matrix as matrix
from experiments.runs.registry import build


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "pods.md")
    matrix.PAGE.write_text(f"# Before\n\n{matrix.BEGIN}\nold\n{matrix.END}\n\nAfter.\n")
    return matrix.PAGE


def test_only_missing_cells_are_compiled_and_the_table_grows(page):
    compiled = []

    def needs(config):
        compiled.append((config.name, config.train.mesh_fsdp, config.train.mesh_expert))
        return GB

    assert matrix.write_matrix(["dense_4b", "v5p-64", "v5e-256"], played(needs)) == 0
    assert compiled == [("dense_4b", 256, 1), ("dense_4b", 32, 1)]
    matrix.write_matrix(["v5p-64"], played(needs))
    assert [name for name, *_ in compiled[2:]] == ["moe_27b", "engram_27b", "engram_40b"]
    text = page.read_text()
    assert text.startswith("# Before") and text.endswith("After.\n") and "old" not in text
    assert text.count("| fits |") == 5 and text.count("| not compiled |") == 15


def test_a_cell_keeps_its_name_when_settings_are_added_and_loses_it_when_one_changes(page, monkeypatch):
    config, where = build("engram_27b"), topology("v5p-64")
    before = matrix.cell_file(config, where)
    assert matrix.cell_file(replace(config, model__hc_mult=2), where) != before
    assert matrix.cell_file(replace(config, data__batch_size=640), where) != before
    known = nested.to_dict

    def with_a_new_setting(config):
        settings = known(config)
        return settings | {"model": settings["model"] | {"new_setting": 1}}

    monkeypatch.setattr(nested, "to_dict", with_a_new_setting)
    assert matrix.cell_file(config, where) == before


def test_a_cell_that_cannot_be_compiled_leaves_the_others(page):
    def compile_programs(config, *rest):
        if config.name == "moe_27b":
            raise ConfigError("no")
        return played(lambda config: GB)(config, *rest)

    assert matrix.write_matrix(["v6e-256"], compile_programs) == 1
    assert page.read_text().count("| fits |") == 3


def test_words_that_are_no_cell_are_refused(page):
    with pytest.raises(ConfigError, match="moe_28b"):
        matrix.write_matrix(["moe_28b"])


@pytest.mark.parametrize("model", matrix.MODELS)
@pytest.mark.parametrize("name", matrix.SLICES)
def test_layouts_divide_and_change_nothing_else(model, name):
    where = topology(name)
    config = matrix.laid_out(build(model), where)
    train, devices = config.train, where.devices
    cut = train.mesh_fsdp * train.mesh_expert
    assert devices % cut == 0 and config.model.hidden_size % cut == 0
    experts = config.model.moe.n_routed_experts
    assert -experts % train.mesh_expert <= experts / 32  # 55 experts on 8 devices: one of them has a place left
    assert config.data.batch_size % (train.grad_accum * devices) == 0
    fields = ("mesh_data", "mesh_fsdp", "mesh_expert", "grad_accum")
    assert replace(config, **{f"train__{f}": getattr(build(model).train, f) for f in fields}) == build(model)
