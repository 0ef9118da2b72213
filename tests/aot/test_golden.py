"""Steps compiled for real TPU topologies are no larger than they were; and bad input stops before that."""

import importlib.util
import json

import pytest
from golden import CASES, FOLDER, small, summary

from engram_jax.aot.child import compile_apart
from engram_jax.aot.chips import topology
from engram_jax.config import ConfigError, replace

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra dev --extra tpu"
)
pytestmark = [pytest.mark.slow, needs_libtpu]

ROOM = 1.03
"""Compilers differ a little; a tensor that is gathered, copied or computed once more differs by more."""


@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_grow(case):
    """After a change that was meant: python tests/aot/golden.py"""
    before, now = json.loads((FOLDER / f"{case}.json").read_text()), summary(case)
    assert now["warnings"] == []
    for name in ("flops", "hbm", "largest result", "host tables"):
        assert now[name] <= ROOM * before[name], name
    for group in now["memory"].keys() - {"code"}:
        allowed = ROOM * before["memory"].get(group, 0) + 1e6
        assert now["memory"][group] <= allowed, group
    for kind in now["sent"]:
        assert now["sent"][kind] <= ROOM * before["sent"].get(kind, 0) + 1e4, kind


@pytest.mark.parametrize("case", ["v5p-4-expert", "v5p-8-host"])
def test_what_is_known_before_code_is_generated_is_what_is_known_after(case):
    where, program, config = CASES[case]
    before, after = (compile_apart(config, topology(where), [program], quick=quick)[program] for quick in (True, False))
    assert before["flops"] == after["flops"] and before["collectives"] == after["collectives"]
    assert before["bytes"]["hbm"] == pytest.approx(after["bytes"]["hbm"], rel=0.01)
    groups = after["memory"]["groups"]
    code = groups.pop("code")
    groups["temporaries"] += groups.pop("results", 0)
    assert before["memory"]["groups"] == groups and before["memory"]["needed"] == after["memory"]["needed"] - code
    # Afterwards some kilobytes of results that are no argument's are counted too.
    assert before["host"]["tables"] == pytest.approx(after["host"]["tables"], rel=1e-4)
    estimates = before["times"]["estimates"]
    assert estimates.keys() == after["times"]["estimates"].keys() - {"compiler"} and before["costliest"] == []


def test_tables_are_on_the_chip_or_on_the_host():
    on_chip, on_host = (json.loads((FOLDER / f"{case}.json").read_text()) for case in ("v5p-4-expert", "v5p-8-host"))
    rows, words = 8 * 1_000_000, 64 * 3 + 2  # two orders of four heads; Adam's moments, the last step and the uses
    assert on_chip["memory"]["memory table"] == pytest.approx(rows * 256 * 4 / 4, rel=0.01)  # whole tiles, four chips
    assert on_chip["host tables"] == 0
    assert "memory table" not in on_host["memory"]
    assert on_host["host tables"] == pytest.approx(rows * words * 4 / 2, rel=0.01)  # two hosts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__mesh_fsdp": 3}, "mesh_fsdp"),
        ({"train__mesh_expert": 4, "model__moe__n_routed_experts": 6}, "n_routed_experts=6"),
        ({"train__mesh_tensor": 4}, "num_attention_heads=2"),
        ({"data__batch_size": 6}, "batch_size=6"),
        ({"train__mesh_context": 4, "data__seq_len": 254}, "seq_len=254"),
        ({"train__mesh_tensor": 2, "model__vocab_size": 511}, "vocab_size=511"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_before_any_compile(changes, said):
    with pytest.raises(ConfigError, match=said):
        compile_apart(replace(small(), **changes), topology("v5e-4"), ["train"])


def test_what_cannot_be_decoded_with_is_refused_too():
    config = replace(small(), train__mesh_context=2, train__mesh_fsdp=2)
    with pytest.raises(ConfigError, match="mesh_context=2: a sequence that is decoded is not cut"):
        compile_apart(config, topology("v5e-4"), ["decode"])
