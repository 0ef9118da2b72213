"""The study `pair`: the MoE baseline, and its twin with memory in place of some experts (paper, table 1).

The analyses (experiments/studies/analyses) look into these runs, which are trained once for all of them.
"""

from __future__ import annotations

from engram_jax.config import EngramConfig, RunConfig, replace, require
from experiments.runs.sizes import moe_small, moe_tiny
from experiments.runs.twins import engram_twin
from experiments.studies.engine.declared import Point, Study
from experiments.studies.trained.allocation import memory_of, with_heads

MOE, ENGRAM = "moe", "engram"
GIVEN_UP = 1 / 6
"""Share of the routed experts that become rows: rho is then near 0.8, as in the paper's allocation study."""


def tiny() -> RunConfig:
    """moe_tiny with all of its 250 steps: about four minutes a run on two cores."""
    return replace(with_heads(moe_tiny(), heads=4, width=16), train__eval_every=0)


def small() -> RunConfig:
    return replace(with_heads(moe_small(), heads=8, width=32), train__eval_every=0)


def points(base: RunConfig) -> tuple[Point, ...]:
    """The baseline and its twin.

    Raises:
      ConfigError: the run has no experts to give up, or too few blocks for the memory's two layers.
    """
    moe, blocks = base.model.moe, base.model.num_hidden_layers
    require(moe.enabled, "model.moe.n_routed_experts=0 must be positive: the twin with memory gives experts up.")
    require(blocks > 3, f"model.num_hidden_layers={blocks} must be at least 4, for the memory's two layers.")
    experts = round(moe.n_routed_experts * (1 - GIVEN_UP))
    require(
        moe.num_experts_per_tok < experts < moe.n_routed_experts,
        f"model.moe.n_routed_experts={moe.n_routed_experts} with {moe.num_experts_per_tok} active leaves no expert to "
        "give up: raise model.moe.n_routed_experts.",
    )
    twin = engram_twin(base, memory_of(base), experts)
    return Point(MOE, 0, replace(base, model__engram=EngramConfig())), Point(ENGRAM, 1, twin)


PAIR = Study(
    name="pair",
    question="At equal parameters, active parameters and FLOPs, is the loss lower with memory for a sixth of the "
    "experts?",
    x_label="memory",
    scales={"tiny": tiny, "small": small},
    points=points,
    shape="differences",
    baseline=MOE,
)
