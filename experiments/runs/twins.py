"""Models of equal cost: from one MoE run, its dense twin and its twin with memory, as the paper compares them.

All three use the same number of weights per token. The two sparse ones also hold the same number of weights: the twin
with memory gives up routed experts for table rows.
"""

from __future__ import annotations

from engram_jax.config import ConfigError, EngramConfig, MoEConfig, RunConfig, replace, require
from engram_jax.counts import backbone_parameters, parameters


def active_width(moe: MoEConfig) -> int:
    """Feed-forward width that a token passes in an MoE block: the width of an equally costly dense block."""
    return (moe.num_experts_per_tok + moe.n_shared_experts) * moe.moe_intermediate_size


def dense_twin(run: RunConfig) -> RunConfig:
    """The same run with a dense feed-forward layer of the active width in every block."""
    return replace(run, model__moe__n_routed_experts=0, model__intermediate_size=active_width(run.model.moe))


def engram_twin(run: RunConfig, engram: EngramConfig, n_routed_experts: int, multiple: int = 4) -> RunConfig:
    """The same run with memory at the size that fewer experts pay for.

    Two numbers are solved for. The reader's projections cost what narrower experts (and dense blocks) save, in steps of
    `multiple`: they are 0.9 % of the paper's active weights but a tenth of a tiny model's. Then `engram_vocab_size` is
    what brings the total back to the MoE's.

    Raises:
      ConfigError: the experts given up do not even pay for the reader.
    """

    def narrowed(width: int) -> RunConfig:
        moe = replace(run.model.moe, n_routed_experts=n_routed_experts, moe_intermediate_size=width)
        return replace(run, model__moe=moe, model__engram=engram, model__intermediate_size=active_width(moe))

    target, widest = parameters(run.model), run.model.moe.moe_intermediate_size
    # Active parameters grow linearly with the width: two of them say where to look.
    least, next_one = (backbone_parameters(narrowed(w).model).active for w in (multiple, 2 * multiple))
    near = min(max(1, 1 + round((target.active - least) / (next_one - least))), widest // multiple)
    widths = [multiple * n for n in (near - 1, near, near + 1) if 1 <= n <= widest // multiple]
    require(
        bool(widths),
        f"model.moe.moe_intermediate_size={widest}: the twin's narrower experts would have a width below {multiple}.",
    )
    width = min(widths, key=lambda w: abs(backbone_parameters(narrowed(w).model).active - target.active))
    twin = narrowed(width)
    spare = target.total - backbone_parameters(twin.model).total
    rows_per_head = spare // (engram.memory_dim * len(engram.engram_layer_ids))
    if rows_per_head < 2:
        raise ConfigError(f"n_routed_experts={n_routed_experts} leaves {spare:,} weights for the tables: give up more.")
    return replace(twin, model__engram__engram_vocab_size=rows_per_head)
