"""The twins that the paper compares throughout: the MoE baseline, and memory for some of its experts (table 1).

Other studies look into these runs (`Study.trained_in`), so that they are trained once.
"""

from __future__ import annotations

from engram_jax.config import EngramConfig, RunConfig, replace, require
from experiments.runs.sizes import moe_small, moe_tiny
from experiments.runs.twins import engram_twin
from experiments.studies.engine.declared import Point, Study
from experiments.studies.trained.allocation import memory_of, with_heads

MOE, ENGRAM = "moe", "engram"
GIVEN_UP = 1 / 6
"""Share of the routed experts that become rows: rho near 0.8, as in the paper's allocation study."""


def tiny() -> RunConfig:
    """moe_tiny, all of its 250 steps: about four minutes a run on two cores."""
    return replace(with_heads(moe_tiny(), heads=4, width=16), train__eval_every=0)


def small() -> RunConfig:
    return replace(with_heads(moe_small(), heads=8, width=32), train__eval_every=0)


def points(base: RunConfig) -> tuple[Point, ...]:
    """The baseline and its twin.

    Raises:
      ConfigError: the run has no experts to give up, or so few blocks that the memory's two layers are one.
    """
    moe, blocks = base.model.moe, base.model.num_hidden_layers
    require(moe.enabled, "model.moe.n_routed_experts=0: the twin with memory needs experts to give up.")
    require(blocks > 3, f"model.num_hidden_layers={blocks}: the memory's two layers need at least 4 blocks.")
    experts = round(moe.n_routed_experts * (1 - GIVEN_UP))
    require(
        moe.num_experts_per_tok < experts < moe.n_routed_experts,
        f"model.moe.n_routed_experts={moe.n_routed_experts} with {moe.num_experts_per_tok} active leaves no expert to "
        "give up: give the run more.",
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
