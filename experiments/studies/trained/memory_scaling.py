"""The study `memory_scaling`: memory of growing size on top of a fixed backbone (paper, section 3.2)."""

from __future__ import annotations

from engram_jax.config import RunConfig, replace, require
from engram_jax.counts import num_rows
from experiments.runs.sizes import engram_small, engram_tiny
from experiments.studies.engine.declared import TOTAL, Point, Study

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Factors on the rows per head of the run that the study starts from: 1.8 decades."""
OVER_FACTORS = (1 / 8, 1 / 2, 2, 8)
"""The same for OverEncoding."""
ENGRAM, OVER_ENCODING = "Engram", "OverEncoding"


def tiny() -> RunConfig:
    return replace(engram_tiny(), train__steps=120, train__eval_every=0, checkpoint__every=60)


def points(base: RunConfig) -> tuple[Point, ...]:
    """From the smallest memory to the largest; then OverEncoding's. x is the number of rows over all layers.

    Raises:
      ConfigError: the run has no memory, or too few rows to divide.
    """
    engram = base.model.engram
    require(engram.enabled, "model.engram.engram_layer_ids is empty: the study needs a run with memory.")
    rows = engram.vocab_size_per_order
    require(
        min(rows) >= 16,
        f"model.engram.engram_vocab_size={engram.engram_vocab_size} must be at least 16: the study also trains 1/8 of "
        "it.",
    )
    over = over_encoding(base)
    made = [_point(base, factor, ENGRAM) for factor in FACTORS]
    made += [_point(over, factor, OVER_ENCODING, "over-encoding-") for factor in OVER_FACTORS]
    return tuple(made)


def _point(base: RunConfig, factor: float, series: str, prefix: str = "") -> Point:
    sizes = tuple(round(size * factor) for size in base.model.engram.vocab_size_per_order)
    config = replace(base, model__engram__engram_vocab_size=sizes)
    slots = sum(num_rows(config.model).values())
    return Point(f"{prefix}slots{slots}", slots, config, series)


def over_encoding(base: RunConfig) -> RunConfig:
    """The run with OverEncoding: the same rows in one table, which the input reads instead of several blocks.

    An order has as many slices as Engram has heads: four at the tiny scale, as OverEncoding was published. Three things
    differ from its publication: the average is amplified, rows start at zero, and they learn at the rate of the other
    weights. Without these it is worse than the twin without memory at the tiny scale (experiments/LOG.md, 2026-11-28).
    """
    engram = base.model.engram
    return replace(
        base,
        model__engram__engram_variant="over_encoding",
        model__engram__engram_layer_ids=(0,),
        model__engram__engram_kernel_size=0,
        model__engram__engram_vocab_size=tuple(
            rows * len(engram.engram_layer_ids) for rows in engram.vocab_size_per_order
        ),
        model__engram__engram_amplification=base.model.hidden_size**0.5,
        model__engram__engram_initializer_range=0.0,
        optimizer__table_lr_multiplier=1.0,
    )


MEMORY_SCALING = Study(
    name="memory_scaling",
    question="With the backbone fixed, does the loss fall along a line in the logarithm of the number of slots, and "
    "below OverEncoding's?",
    x_label="slots (table rows over all layers)",
    scales={"tiny": tiny, "small": engram_small},
    points=points,
    shape="log_line",
    varies=(TOTAL,),
    paper="memory_scaling_paper.json",
    caveats=(
        "OverEncoding has Engram's slots and row width in one table instead of several. It has no gate, no convolution "
        "and a smaller projection, so its active parameters and FLOPs per token (table above) are fewer, and nothing "
        "makes up for them. The paper does not say how it set its own.",
        "Learning rates were tuned for neither. OverEncoding is amplified as in LongCat, and its rows start at zero; "
        "with --model.engram.engram_initializer_range 0 Engram's rows start at zero too.",
    ),
)
