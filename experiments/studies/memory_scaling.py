"""Memory on top of a fixed backbone (the paper's section 3.2): does loss fall with the number of slots, and how?"""

from __future__ import annotations

from engram_jax.config import RunConfig, replace, require
from engram_jax.counts import num_rows
from experiments.runs import engram_small, engram_tiny
from experiments.studies.declared import TOTAL, Point, Study

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Of the rows per head of the run it starts from: 1.8 decades."""


def tiny() -> RunConfig:
    return replace(engram_tiny(), train__steps=120, train__eval_every=0, checkpoint__every=60)


def points(base: RunConfig) -> tuple[Point, ...]:
    """From the smallest memory to the largest, x being rows over all layers.

    Raises:
      ConfigError: the run has no memory, or one with too few rows to divide.
    """
    engram = base.model.engram
    require(engram.enabled, "model.engram.engram_layer_ids is empty: the study needs a run with memory.")
    rows = engram.vocab_size_per_order
    require(
        min(rows) >= 16,
        f"model.engram.engram_vocab_size={engram.engram_vocab_size}: an eighth of it is no table; give it 16 or more.",
    )
    made = []
    for factor in FACTORS:
        sizes = tuple(round(size * factor) for size in rows)
        config = replace(base, model__engram__engram_vocab_size=sizes)
        slots = sum(num_rows(config.model).values())
        made.append(Point(f"slots{slots}", slots, config))
    return tuple(made)


MEMORY_SCALING = Study(
    name="memory_scaling",
    question="With the backbone fixed, does the loss fall along a line in the logarithm of the number of slots?",
    x_label="slots (table rows over all layers)",
    scales={"tiny": tiny, "small": engram_small},
    points=points,
    shape="log_line",
    varies=(TOTAL,),
    paper="memory_scaling_paper.json",
    caveats=("OverEncoding, which the paper draws beside its curve, is not among the runs.",),
)
