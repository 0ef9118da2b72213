"""Where the memory should be read (the paper's section 6.2): one module at every depth, and two that share its size."""

from __future__ import annotations

from engram_jax.config import EngramConfig, RunConfig, replace, require
from experiments.studies.engine.declared import Point, Study
from experiments.studies.trained import pair

TWO = "two"


def tiny() -> RunConfig:
    """The pair's at half its length: about two minutes a run on two cores."""
    return replace(pair.tiny(), train__steps=120, checkpoint__every=60)


def points(base: RunConfig) -> tuple[Point, ...]:
    """Two modules, then one in every block from the first, x being its number; and the baseline without memory.

    One module has both modules' rows in rows twice as wide, as many of them to a head: all weights of tables and
    projections are those of the two.

    Raises:
      ConfigError: what `pair.points` raises; or there are more blocks than a study has use for.
    """
    blocks = base.model.num_hidden_layers
    require(blocks <= 16, f"model.num_hidden_layers={blocks}: a module in each makes too many runs; give it up to 16.")
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
