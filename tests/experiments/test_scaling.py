"""The rules against what is printed in the papers, and the ladder against its stated ratios."""

import itertools
import re
from pathlib import Path

import pytest

from engram_jax.config import ConfigError
from engram_jax.counts import parameters, sparse_parameters
from experiments.run import main
from experiments.runs import scaling
from experiments.runs.ladder import RUNGS
from experiments.runs.registry import RUNS, build
from experiments.studies.engine.declared import TOTAL, Point, prove

KINDS = ("dense", "moe", "engram")


def spelt(budget):
    return f"{budget:.0e}".replace("+", "")


@pytest.fixture(scope="module")
def ladder():
    """The registered runs by budget and kind."""
    return {budget: {kind: build(f"{kind}_{spelt(budget)}") for kind in KINDS} for budget in RUNGS}


def count(run):
    """P_act and P_tot, without vocabulary matrices, and tokens."""
    counts = parameters(run.model)
    total = counts.total - 2 * run.model.vocab_size * run.model.hidden_size
    return counts.active, total, run.train.steps * run.data.batch_size * run.data.seq_len


def test_the_ladder_goes_to_the_papers_budget_in_equal_steps():
    assert len(RUNGS) == 4 and RUNGS[-1] == 2e20
    assert [b / a for a, b in itertools.pairwise(RUNGS)] == pytest.approx([100] * 3)
    assert {f"{kind}_{spelt(budget)}" for kind in KINDS for budget in RUNGS} <= set(RUNS)


@pytest.mark.parametrize("budget", RUNGS)
def test_ratios_are_the_stated_ones(ladder, budget):
    for kind, run in ladder[budget].items():
        active, total, tokens = count(run)
        assert 6 * active * tokens == pytest.approx(budget, rel=0.01)
        assert tokens / active == pytest.approx(103, rel=0.01)
        if kind != "dense":
            assert total / active == pytest.approx(10, rel=0.01)
    assert 0.75 <= sparse_parameters(ladder[budget]["engram"].model)[1] <= 0.80
    assert sparse_parameters(ladder[budget]["moe"].model)[1] == 1


@pytest.mark.parametrize("budget", RUNGS)
def test_triples_cost_the_same(ladder, budget):
    points = [Point(kind, 0.0, run) for kind, run in ladder[budget].items()]
    prove(points[1:])
    prove(points, varies=(TOTAL,))
    runs = [point.config for point in points]
    assert all((run.data, run.optimizer, run.train) == (runs[0].data, runs[0].optimizer, runs[0].train) for run in runs)
    assert not runs[0].model.moe.enabled and runs[2].model.engram.enabled and not runs[1].model.engram.enabled


def test_the_papers_point_comes_out(ladder):
    """Section 3.1 at 2e20: 568 M active, about 5.7 B, 106 experts, 86 and 81 of them at rho 80 and 75 %; section 6.2:
    12 blocks, memory in the second and the sixth, 640 wide."""
    moe, engram = (ladder[2e20][kind] for kind in ("moe", "engram"))
    active, total, tokens = count(moe)
    assert active == pytest.approx(568e6, rel=5e-3) and total == pytest.approx(5.7e9, rel=5e-3)
    assert tokens == pytest.approx(58.7e9, rel=5e-3)
    assert moe.model.moe.n_routed_experts == pytest.approx(106, abs=1)
    assert 81 <= engram.model.moe.n_routed_experts <= 86
    memory = engram.model.engram
    assert (moe.model.num_hidden_layers, memory.engram_layer_ids, memory.memory_dim) == (12, (1, 5), 640)
    assert (moe.model.vocab_size, moe.data.seq_len) == (129_280, 4096)


def test_the_papers_27b_comes_out_of_its_own_ratios():
    """Tables 5 and 1: 262 B tokens for 3.8 B active parameters of 26.7 B with one vocabulary matrix, rho 74.3 %."""
    total = 26.717e9 - 129_280 * 2560
    ratios = scaling.Ratios(262.144e9 / 3.808e9, total / 3.808e9, rho=0.743)
    made = scaling.triple(6 * 3.808e9 * 262.144e9, ratios)
    model, engram = made["moe"].model, made["engram"].model
    assert (model.num_hidden_layers, model.hidden_size, model.attention) == (30, 2560, build("moe_27b").model.attention)
    assert (model.moe.n_routed_experts, model.moe.moe_intermediate_size) == (72, 1536)
    assert engram.moe.n_routed_experts == pytest.approx(55, abs=1)
    theirs = build("engram_27b").model.engram
    ours = engram.engram
    assert (ours.engram_layer_ids, ours.engram_n_heads, ours.engram_head_dim) == (
        theirs.engram_layer_ids,
        theirs.engram_n_heads,
        theirs.engram_head_dim,
    )
    assert parameters(engram).memory == pytest.approx(5.7e9, rel=0.03)


def test_rates_and_batches_are_the_published_law():
    """DeepSeek LLM's, whose powers of ten are worked out here in logarithms."""
    assert scaling.learning_rate(1e20) == pytest.approx(0.3118 * 10 ** (-20 * 0.125), rel=0.01)
    assert scaling.batch_tokens(1e20) == pytest.approx(0.2920 * 10 ** (20 * 0.3271))
    for budget in RUNGS:
        run = build(f"moe_{spelt(budget)}")
        tokens = run.data.batch_size * run.data.seq_len
        assert tokens == pytest.approx(scaling.batch_tokens(budget), rel=0.15)


@pytest.mark.parametrize("devices", [1, 4, 8, 96, 256])
def test_every_device_gets_as_many_sequences(devices):
    size = scaling.batch_size(2e20, 4096, devices)
    assert size % devices == 0 and size == pytest.approx(scaling.batch_tokens(2e20) / 4096, rel=0.2)


def test_any_budget_has_a_name(capsys):
    assert build("engram_5e17").name == "engram_5e17"
    with pytest.raises(ConfigError, match="engram_1e999"):
        build("engram_1e999")
    active, total, tokens = count(build("moe_1.5e19"))
    assert 6 * active * tokens == pytest.approx(1.5e19, rel=0.01) and total / active == pytest.approx(10, rel=0.01)
    assert main(["engram_5e17", "--print"]) == 0
    assert '"name": "engram_5e17"' in capsys.readouterr().out


def test_sizes_grow_with_the_budget():
    runs = [scaling.moe_run(10.0**exponent) for exponent in range(14, 24)]
    for quantity in (
        lambda run: run.model.hidden_size * run.model.num_hidden_layers,
        lambda run: run.model.vocab_size,
        lambda run: run.data.seq_len,
        lambda run: run.train.steps * run.data.batch_size * run.data.seq_len,
        lambda run: -run.optimizer.learning_rate,
    ):
        assert sorted(map(quantity, runs)) == list(map(quantity, runs))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaling.moe_run(9e13), r"budget=9e\+13 FLOPs lies outside of 1e\+14 to 1e\+23"),
        (lambda: scaling.moe_run(2e23), r"outside of"),
        (lambda: build("engram_9e12"), r"budget=9e\+12"),
        (lambda: scaling.moe_run(2e14, devices=256), r"256 devices.* about 54 sequences .*at most 54"),
        (lambda: scaling.Ratios(rho=1.0), r"rho=1.0 must lie"),
        (lambda: scaling.Ratios(sparsity=0.5), r"sparsity=0.5"),
        (lambda: scaling.Ratios(tokens_per_parameter=0), r"tokens_per_parameter=0"),
        (lambda: scaling.triple(2e20, scaling.Ratios(rho=0.999)), r"rho=0.999 cannot be had: .*0\.97"),
    ],
)
def test_what_cannot_be_is_said(call, message):
    with pytest.raises(ConfigError, match=re.compile(message)):
        call()


@pytest.mark.parametrize("budget", RUNGS)
def test_the_documented_ladder_is_this_one(ladder, budget):
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for kind, run in ladder[budget].items():
        row = next(line for line in page.splitlines() if f"| `{kind}_{spelt(budget)}` |" in line)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        active, total, tokens = count(run)
        model, moe = run.model, run.model.moe
        assert [number(cells[i]) for i in (2, 3, 7)] == pytest.approx([active, total, tokens], rel=5e-3)
        assert number(cells[5]) == pytest.approx(parameters(model).memory, rel=5e-3)
        width = f"{moe.n_routed_experts} x {moe.moe_intermediate_size}" if moe.enabled else f"{model.intermediate_size}"
        assert cells[8:12] == [
            f"{model.num_hidden_layers} x {model.hidden_size}",
            width,
            f"{run.data.batch_size} x {run.data.seq_len}",
            f"{run.train.steps:,}",
        ]
        assert float(cells[12]) == run.optimizer.learning_rate


def number(text):
    """The number that `5.69 B` is; a dash is none."""
    digits, _, unit = text.partition(" ")
    return 0.0 if digits == "-" else float(digits.replace(",", "")) * {"": 1, "M": 1e6, "B": 1e9}[unit]
