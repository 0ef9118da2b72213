"""The study `ablations`: the memory without one of its parts, or with one part changed (paper, section 6.2)."""

from __future__ import annotations

from typing import Any

from engram_jax.config import RunConfig, replace, require
from engram_jax.counts import num_rows
from experiments.studies.engine.declared import ACTIVE, FLOPS, TOTAL, Point, Study
from experiments.studies.trained import pair

REFERENCE = "reference"
"""The point that the others are compared with: the twin with memory."""
LESS = (TOTAL, ACTIVE, FLOPS)
"""Quantities of which a point without a part of the reader has less. Nothing makes up for it, as in the paper."""
HEADS = (1, 2, 4, 8, 16)
"""Hash heads for each order."""
MULTIPLIERS = (1.0, 2.0, 10.0)
"""Multipliers of the tables' learning rate; the reference has the paper's 5."""


def tiny() -> RunConfig:
    """The pair's at half its length: about two minutes a run on two cores."""
    return replace(pair.tiny(), train__steps=120, checkpoint__every=60)


def points(base: RunConfig) -> tuple[Point, ...]:
    """The reference; then the paper's changes of it, so that a study that is ended early has these; then others.

    x numbers the points. Points with other orders or heads read as many numbers per token, from tables as large.

    Raises:
      ConfigError: what `pair.points` raises, or the run's memory is not the paper's.
    """
    moe, twin = (point.config for point in pair.points(base))
    engram, optimizer = twin.model.engram, twin.optimizer
    require(
        engram.engram_variant == "paper" and engram.engram_max_ngram_size == 3 and not engram.engram_without,
        "the ablations start from the paper's memory of 2-grams and 3-grams: leave model.engram.engram_variant, "
        "engram_max_ngram_size and engram_without at their defaults.",
    )
    require(
        (optimizer.table_optimizer, optimizer.table_lr_multiplier) == ("catch_up_adam", 5.0),
        "the ablations start from optimizer.table_optimizer=catch_up_adam with table_lr_multiplier=5: leave both so.",
    )
    made: dict[str, RunConfig] = {REFERENCE: twin, pair.MOE: moe}
    less = {
        "no_multi_branch": _memory(twin, engram_without=("multi_branch",)),
        "no_gate": _memory(twin, engram_without=("gate",)),
        "no_convolution": _memory(twin, engram_kernel_size=0),
    }
    made |= less | {"no_compression": _memory(twin, engram_without=("compression",))}
    made |= {"orders2": reshaped(twin, 2, engram.engram_n_heads), "orders234": reshaped(twin, 4, engram.engram_n_heads)}
    made |= {
        "lazy_adam": replace(twin, optimizer__table_optimizer="lazy_adam"),
        "sinkhorn": replace(twin, optimizer__table_optimizer="sinkhorn"),
        "narrow_hash": _memory(twin, engram_without=("wide_hash",)),
        "across_documents": _memory(twin, engram_cross_documents=True),
        "zero_rows": _memory(twin, engram_initializer_range=0.0),
    }
    others = [heads for heads in HEADS if heads != engram.engram_n_heads]
    with_heads = {heads: reshaped(twin, 3, heads) for heads in reversed(others)}  # the most are the first to be refused
    rates = {f"table_lr_x{by:g}": replace(twin, optimizer__table_lr_multiplier=by) for by in MULTIPLIERS}
    made |= rates | {f"heads{heads}": with_heads[heads] for heads in others}
    return tuple(
        Point(name, x, config, varies=LESS if name in less else ()) for x, (name, config) in enumerate(made.items())
    )


def _memory(run: RunConfig, **changes: Any) -> RunConfig:
    return replace(run, model__engram=replace(run.model.engram, **changes))


def reshaped(run: RunConfig, orders_up_to: int, heads: int) -> RunConfig:
    """The run with other orders or heads. A token reads as many numbers (to a whole row width), from as many in all.

    Raises:
      ConfigError: with so many heads, a row would have less than one number.
    """
    engram = run.model.engram
    rows_per_token = (orders_up_to - 1) * heads
    width = round(engram.memory_dim / rows_per_token)
    require(
        width > 0,
        f"model.engram.engram_n_heads={engram.engram_n_heads} of engram_head_dim={engram.engram_head_dim}: the study "
        f"reads {rows_per_token} rows per token from the same width, which needs {rows_per_token // 2 + 1} or more.",
    )

    def with_rows(per_head: int) -> RunConfig:
        return _memory(
            run,
            engram_max_ngram_size=orders_up_to,
            engram_n_heads=heads,
            engram_head_dim=width,
            engram_vocab_size=max(2, per_head),
        )

    # Each head has its own prime number of rows, above the number asked for: more heads have more rows in all.
    num_heads = len(engram.engram_layer_ids) * rows_per_token
    wanted = sum(num_rows(run.model).values()) * engram.engram_head_dim // width
    surplus = sum(num_rows(with_rows(wanted // num_heads).model).values()) - wanted
    return with_rows((wanted - surplus) // num_heads)


ABLATIONS = Study(
    name="ablations",
    question="What is each part of the memory worth: does the loss rise without it?",
    x_label="point",
    scales={"tiny": tiny, "small": pair.small},
    points=points,
    shape="differences",
    baseline=REFERENCE,
    paper="ablations_paper.json",
    caveats=(
        "A point without a part has fewer active weights than the reference (see the budget), and nothing makes up for "
        "them: part of its loss is theirs. In the paper's models they are too few to show.",
        "Learning rates were not tuned again for any point. sinkhorn measures steps differently from Adam, so its "
        "difference also holds how well the reference's rate suits it.",
        "orders2, orders234 and the heads read as many numbers per token as the reference, to the nearest whole width "
        "of a row, from tables of its size.",
        "The paper's numbers are one run each.",
    ),
)
