"""The study `layers`: the block that reads the memory (paper, section 6.2); one module, or two of half its size."""

from __future__ import annotations

from engram_jax.config import EngramConfig, RunConfig, replace, require
from experiments.studies.engine.declared import Point, Study
from experiments.studies.trained import pair

TWO = "two"
"""The point with two modules."""


def tiny() -> RunConfig:
    """The pair's at half its length: about two minutes a run on two cores."""
    return replace(pair.tiny(), train__steps=120, checkpoint__every=60)


def points(base: RunConfig) -> tuple[Point, ...]:
    """Two modules; then one module in each block, with the block's number as x; then the baseline without memory.

    One module has rows twice as wide and as many of them per head. So its tables and projections have as many weights
    as those of the two modules.

    Raises:
      ConfigError: what `pair.points` raises, or more than 16 blocks.
    """
    blocks = base.model.num_hidden_layers
    require(blocks <= 16, f"model.num_hidden_layers={blocks} must be at most 16: each block gets a run.")
    moe, twin = pair.points(base)
    two = twin.config.model.engram
    made = [Point(TWO, -1, twin.config)]
    for block in range(blocks):
        one = replace(two, engram_layer_ids=(block,), engram_head_dim=len(two.engram_layer_ids) * two.engram_head_dim)
        made.append(Point(f"layer{block}", block, with_memory(twin.config, one)))
    return (*made, Point(pair.MOE, blocks, moe.config))


def with_memory(run: RunConfig, engram: EngramConfig) -> RunConfig:
    return replace(run, model__engram=engram)


LAYERS = Study(
    name="layers",
    question="At equal cost, in which block should the memory be read, and is it better split between two?",
    x_label="block (-1: two of them)",
    scales={"tiny": tiny, "small": pair.small},
    points=points,
    shape="differences",
    baseline=TWO,
    paper="layers_paper.json",
    caveats=(
        "Blocks are numbered from 0 (the paper's layer 2 is its block 1), and the paper's model has 12 of them: its "
        "numbers are compared by depth relative to the whole, at best.",
        "A single module's rows are twice as wide, so its hashes collide as those of the two do, but it has one gate "
        "and one convolution instead of two.",
    ),
)
