"""Remedies for a step that does not fit the chips: the standard changes of the settings.

No remedy changes the mathematics of the run. Some change its rounding, or the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engram_jax.aot.chips import Topology
from engram_jax.config import ConfigError, RunConfig, replace
from engram_jax.registries import PLACEMENTS
from engram_jax.sharding import BATCH

CHUNK = 512
"""Positions whose logits are computed at a time, for runs that compute more."""


@dataclass(frozen=True)
class Remedy:
    """One change of the settings, or several together."""

    why: str
    changes: dict[str, Any] = field(default_factory=dict)
    """New values by field, for `config.replace`."""

    def __str__(self) -> str:
        fields = " ".join(f"--{name.replace('__', '.')} {value}" for name, value in self.changes.items())
        return f"{fields}  ({self.why})"

    def apply(self, config: RunConfig) -> RunConfig:
        return replace(config, **self.changes)


def remedies(config: RunConfig, where: Topology) -> list[Remedy]:
    """The single remedies that this config does not have yet, and then stacks of them, each with one remedy more."""
    single = [remedy for remedy in _singles(config, where) if _is_valid(config, remedy)]
    stacked, changes = [], {}
    for remedy in single:
        changes = changes | remedy.changes
        both = Remedy("together with those above", dict(changes))
        if len(changes) > len(remedy.changes) and _is_valid(config, both):
            stacked.append(both)
    return [*single, *stacked]


def _singles(config: RunConfig, where: Topology) -> Iterator[Remedy]:
    train, model = config.train, config.model
    fixed = train.mesh_context * train.mesh_tensor
    copies = where.devices // (train.mesh_fsdp * train.mesh_expert * fixed)
    within = copies // where.slices
    if within > 1:
        fsdp = train.mesh_fsdp * within
        changes = {"train__mesh_fsdp": fsdp, "train__mesh_data": -1}
        yield Remedy(
            f"weights and optimizer state cut into {fsdp * train.mesh_expert} parts instead of kept whole", changes
        )
    if model.remat != "full":
        yield Remedy("the backward pass computes the blocks again", {"model__remat": "full"})
    if model.loss_chunk_len == 0 or model.loss_chunk_len > CHUNK:
        yield Remedy(f"logits of {CHUNK} positions at a time", {"model__loss_chunk_len": CHUNK})
    shards = where.devices // fixed if len(BATCH) > 1 else 1
    sequences = config.data.batch_size
    parts = [
        n for n in range(train.grad_accum + 1, sequences + 1) if sequences % n == 0 and sequences // n % shards == 0
    ]
    if parts:
        yield Remedy("the batch in smaller parts", {"train__grad_accum": parts[0]})
        if parts[-1] != parts[0]:
            yield Remedy("the batch in the smallest parts", {"train__grad_accum": parts[-1]})
    elif sequences // train.grad_accum == shards:
        halved = {"train__mesh_fsdp": max(1, train.mesh_fsdp // 2), "train__mesh_data": -1}
        halved |= {"train__grad_accum": 2 * train.grad_accum}
        if config.data.seq_len % (2 * train.mesh_context) == 0:
            yield Remedy(
                "every sequence on twice as many devices, half as many at a time",
                {"train__mesh_context": 2 * train.mesh_context, **halved},
            )
        if train.mesh_tensor == 1 and model.attention.num_attention_heads % 2 == 0:
            yield Remedy(
                "every token on two devices, with half the batch at a time", {"train__mesh_tensor": 2, **halved}
            )
    placement = PLACEMENTS[config.memory.placement].create(config.memory, "tpu")
    if model.engram.enabled and placement.device_share > 0:
        yield Remedy("tables in the hosts' memory", {"memory__placement": "host"})


def _is_valid(config: RunConfig, remedy: Remedy) -> bool:
    try:
        remedy.apply(config)
    except ConfigError:
        return False
    return True


def advice(reports: dict[str, Any], config: RunConfig, where: Topology) -> list[str]:
    """Lines of text that say what exceeds the memory, and the remedies to try."""
    lines = []
    for program, r in reports.items():
        memory = r["memory"]
        if memory["fits"]:
            continue
        over = (memory["needed"] - memory["available"]) / 1e9
        largest = sorted(memory["groups"].items(), key=lambda item: -item[1])[:2]
        named = " and ".join(f"{name} ({number / 1e9:.1f} GB)" for name, number in largest) or "not known"
        lines.append(f"{program} needs {over:.1f} GB a chip more than there is; the largest groups are {named}.")
    if any(not r.get("host", {"fits": True})["fits"] for r in reports.values()):
        lines.append("The tables exceed the hosts' memory: take more hosts, or an optimizer with smaller rows.")
    singles = [r for r in remedies(config, where) if r.why != "together with those above"]
    lines += [f"try {remedy}" for remedy in singles]
    if singles:
        lines.append("or let --suggest compile them, and rank what fits.")
    else:
        lines.append("every standard remedy is taken: use more chips, or lower data.seq_len.")
    return lines
