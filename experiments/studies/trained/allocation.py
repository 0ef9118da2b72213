"""The study `allocation`: how to divide the idle parameters between experts and memory (paper, section 3.1)."""

from __future__ import annotations

from engram_jax.config import ConfigError, EngramConfig, RunConfig, replace, require
from engram_jax.counts import sparse_parameters
from experiments.runs.sizes import moe_small, moe_tiny
from experiments.runs.twins import engram_twin
from experiments.studies.engine.declared import Point, Study

SHARES = (0.20, 0.30, 0.40, 0.50, 0.60, 0.70, 0.75, 0.80, 0.90, 1.00)
"""Values of rho, the experts' share of the sparse parameters (eq. 7). The paper's begin at 0.40, where a tiny model
trained on few tokens still gains from giving up experts."""
NEAR = 0.03
"""Whole experts do not reach every share. A share is left out if the nearest one is further away than this."""
SMALL, LARGE = "C", "3C"
"""Names of the two budgets. The paper's larger one has 1.75 times the active parameters and three times the compute."""


def tiny() -> RunConfig:
    """moe_tiny for 120 steps: about two minutes a run on two cores."""
    return replace(
        with_heads(moe_tiny(), heads=4, width=16), train__steps=120, train__eval_every=0, checkpoint__every=60
    )


def small() -> RunConfig:
    return with_heads(moe_small(), heads=8, width=32)


def with_heads(run: RunConfig, heads: int, width: int) -> RunConfig:
    """The run with a memory's settings and no memory yet: `--model.engram.engram_n_heads 8` changes all points."""
    return replace(run, model__engram=EngramConfig(engram_n_heads=heads, engram_head_dim=width))


def memory_of(base: RunConfig) -> EngramConfig:
    """The run's memory, in the layers of the paper's 27B model: the second block and the one in the middle."""
    return replace(base.model.engram, engram_layer_ids=(1, base.model.num_hidden_layers // 2))


def larger(base: RunConfig) -> RunConfig:
    """The run, 1.5 times as wide and 1.5 times as long, for three times the compute (2.9 times at the tiny scale).

    The number of experts stays, so that both budgets have the same shares to offer.
    """
    model, attention = base.model, base.model.attention

    def half_more(number: int) -> int:
        require(number % 2 == 0, f"{number} heads or widths must be even: the second budget has 1.5 times as many.")
        return number * 3 // 2

    widths = {f"model__{name}": half_more(getattr(model, name)) for name in ("hidden_size", "intermediate_size")}
    heads = {
        f"model__attention__{name}": half_more(getattr(attention, name))
        for name in ("num_attention_heads", "num_key_value_heads", "kv_lora_rank")
    }
    return replace(
        base,
        **widths,
        **heads,
        model__moe__moe_intermediate_size=half_more(model.moe.moe_intermediate_size),
        model__engram__engram_head_dim=half_more(model.engram.engram_head_dim),
        train__steps=base.train.steps * 3 // 2,
    )


def points(base: RunConfig) -> tuple[Point, ...]:
    """Both budgets, the smaller one first. Raises what `at_budget` does."""
    return at_budget(base, SMALL) + at_budget(larger(base), LARGE, prefix=f"{LARGE}-")


def at_budget(base: RunConfig, series: str, prefix: str = "") -> tuple[Point, ...]:
    """From the most memory to none. x is rho in percent.

    Raises:
      ConfigError: the run has too few experts for four shares, or too few blocks.
    """
    moe = base.model.moe
    require(moe.enabled, "model.moe.n_routed_experts=0 must be positive: the study gives experts up.")
    require(
        base.model.num_hidden_layers > 3,
        f"model.num_hidden_layers={base.model.num_hidden_layers} must be at least 4, for the memory's two layers.",
    )
    found = {1.0: replace(base, model__engram=EngramConfig())}
    for experts in range(moe.num_experts_per_tok + 1, moe.n_routed_experts):
        try:
            twin = engram_twin(base, memory_of(base), experts)
        except ConfigError:
            continue  # so few experts do not pay for the reader
        found[sparse_parameters(twin.model)[1]] = twin
    nearest = [(min(found, key=lambda rho, share=share: abs(rho - share)), share) for share in SHARES]
    chosen = sorted({rho for rho, share in nearest if abs(rho - share) <= NEAR})
    require(
        len(chosen) > 3,
        f"model.moe.n_routed_experts={moe.n_routed_experts} with {moe.num_experts_per_tok} active allows only "
        f"{len(chosen)} allocations, and the study needs 4: raise model.moe.n_routed_experts.",
    )
    return tuple(Point(f"{prefix}rho{100 * rho:03.0f}", round(100 * rho, 2), found[rho], series) for rho in chosen)


ALLOCATION = Study(
    name="allocation",
    question="At fixed total and active parameters, which share of the idle ones should be experts (rho), the rest "
    "being memory; and does it move with the compute?",
    x_label="rho: experts' share of the sparse parameters, %",
    scales={"tiny": tiny, "small": small},
    points=points,
    shape="valley",
    baseline="rho100",
    paper="allocation_paper.json",
    caveats=(
        "Every point with memory has narrower experts than rho100, which pay for the reader's projections. The step "
        "from rho100 to the next point holds this too. In the paper's models the projections are too small to show.",
        "Learning rates are the same at both budgets, tuned at neither.",
    ),
)
