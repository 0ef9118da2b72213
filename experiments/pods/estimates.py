"""What a run needs of a slice, from counts alone: memory of a chip, time of a step. No compiler was asked.

`python -m experiments.compile` asks it, in minutes; docs/scaling.md sets the two beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_jax.aot.chips import Topology
from engram_jax.aot.slices import sequence_bytes
from engram_jax.config import RunConfig
from engram_jax.counts import GROUPS, backbone_parameters, flops_per_token, leaves, state_bytes, table_bytes
from engram_jax.registries import PLACEMENTS

MFU = {"v4": 0.3, "v5e": 0.2, "v5p": 0.38, "v6e": 0.1, "7x": 0.24}
"""Share of the chip's peak that is assumed: the lower ends that compiling the paper's models gives (docs/pods.md);
for v4, where nothing was compiled, between v5e and v5p as its network is. None was measured."""
SURE, SURE_WITH_EXCHANGE, HOPELESS = 0.8, 0.5, 1.2
"""Shares of the chip's memory: up to the first an estimate is believed (the second where experts are distributed: the
compiler allocates a third more there, elsewhere an eighth more at most; docs/scaling.md), and beyond the third."""
EXCHANGE = "exchange of experts"
SHORTEST_STEP = 5e-3
"""Seconds that a step is assumed to take however small it is: hundreds of little operations and collectives."""


@dataclass(frozen=True)
class Needs:
    memory: dict[str, float]
    """Bytes of one chip, by group."""
    available: int
    flops: float
    """Of the whole run, by counts.py: attention and logits are in it, which the budget's 6 N D leaves out."""
    seconds_at_peak: float
    """Of a step."""
    chip_hours_at_peak: float
    mfu: float

    @property
    def needed(self) -> float:
        return sum(self.memory.values())

    @property
    def verdict(self) -> str:
        share, sure = self.needed / self.available, SURE_WITH_EXCHANGE if EXCHANGE in self.memory else SURE
        return "fits" if share <= sure else "close: compile it" if share <= HOPELESS else "too large"

    @property
    def seconds(self) -> float:
        return max(self.seconds_at_peak / self.mfu, SHORTEST_STEP)

    @property
    def chip_hours(self) -> float:
        return self.chip_hours_at_peak * self.seconds / self.seconds_at_peak


def needs(run: RunConfig, where: Topology) -> Needs:
    """Estimates for a run that is laid out for the slice (engram_jax/aot/slices.py)."""
    tokens = run.data.batch_size * run.data.seq_len
    per_step = flops_per_token(run.model, run.data.seq_len) * tokens
    seconds = per_step / (where.chips * where.chip.flops)
    return Needs(
        memory=memory(run, where),
        available=where.chip.hbm_bytes,
        flops=per_step * run.train.steps,
        seconds_at_peak=seconds,
        chip_hours_at_peak=seconds * run.train.steps * where.chips / 3600,
        mfu=MFU[where.chip.name],
    )


def memory(run: RunConfig, where: Topology) -> dict[str, float]:
    """Bytes of one chip. State and tables are counted, the rest is estimated; tiles' padding is in none of it."""
    model, train = run.model, run.train
    cut = train.mesh_fsdp * train.mesh_expert * train.mesh_context * train.mesh_tensor
    at_once = run.data.batch_size / where.devices / train.grad_accum
    state = state_bytes(model, run.optimizer, run.memory)
    tables = table_bytes(model, run.optimizer, run.memory, where.devices).values()
    placement = PLACEMENTS[run.memory.placement].create(run.memory, "tpu")
    logits = at_once * (model.loss_chunk_len or run.data.seq_len) * model.vocab_size
    groups = {
        "weights and optimizer": sum(size for name, size in state.items() if name != "memory") / cut,
        "gradients": 4 * backbone_parameters(model).total / cut,
        "tables": placement.device_share * sum(table.total for table in tables),
        "activations": at_once * sequence_bytes(run),
        "logits and their gradient": 2 * 4 * logits,
        # Gathered in bfloat16 while the next one is, and its gradient in float32 before it is scattered.
        "a block's weights": (2 + 2 + 4) * largest_block(run) if cut > 1 else 0,
        EXCHANGE: exchange_bytes(run, at_once),
    }
    return {name: where.chip.devices * size for name, size in groups.items() if size}


def largest_block(run: RunConfig) -> float:
    """Parameters of a block that a device gathers: of distributed experts it computes with its own alone."""
    sizes = dict.fromkeys(GROUPS, 0.0)
    for leaf in leaves(run.model):
        sizes[leaf.group] += leaf.size / leaf.copies
    experts = sizes["routed_experts"] / run.train.mesh_expert + sizes["shared_experts"] + sizes["router"]
    return sizes["attention"] + sizes["hyper_connections"] + max(sizes["dense_ffn"], experts)


def exchange_bytes(run: RunConfig, at_once: float) -> float:
    """Tokens that distributed experts are sent and send back, and their hidden units, in bfloat16 and both passes."""
    moe = run.model.moe
    if run.train.mesh_expert == 1:
        return 0.0
    sent = at_once * run.data.seq_len * moe.num_experts_per_tok * moe.capacity_factor
    return 2 * 2 * sent * (2 * run.model.hidden_size + 3 * moe.moe_intermediate_size)
