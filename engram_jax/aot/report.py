"""What a compiled step needs of its chips, in numbers of one CHIP and one step (a chip of 7x is two jax devices).

Memory is the compiler's: the arguments as they lie, tiles included, and its own temporaries. FLOPs, bytes and
collectives are counted in the program's text, loops with their trip count (work.py, collectives.py). Times are
estimates, each labelled as what it is: nothing here ran on a TPU.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from engram_jax.aot import hlo
from engram_jax.aot.chips import Topology
from engram_jax.aot.collectives import Collective, Network, collectives
from engram_jax.aot.lowering import DECODE, Arguments, Compiled, DecodeArguments, TooLarge, exchanged_bytes
from engram_jax.aot.memory import argument_groups, hbm, host, largest_buffers
from engram_jax.aot.work import Work, work
from engram_jax.counts import flops_per_token
from engram_jax.runs.parts import Parts

LONG_LOOP = 1000
"""Rounds from which a loop is worth a line: a gather that became one is run row by row."""

LARGE = 2**20
"""Bytes below which no collective is worth a warning."""


def program_report(
    program: str, compiled: Compiled, given: Arguments | DecodeArguments, parts: Parts, where: Topology
) -> dict[str, Any]:
    module, each = hlo.parse(compiled.text), where.chip.devices
    done, sent = work(module), collectives(module, Network.of(parts.mesh))
    if compiled.sizes is None:  # the few cycles there are come from before code is generated
        done.cycles = 0.0
    data, share = parts.config.data, 1.0 if program == "train" else 1 / 3
    tokens, worst = (
        data.batch_size * (1 if program == DECODE else data.seq_len),
        hlo.parse(compiled.text, every_branch=True),
    )
    useful = share * flops_per_token(parts.config.model, data.seq_len) * tokens / where.chips
    return {
        "mesh": dict(parts.mesh.shape),
        "memory": hbm(module, compiled, where),
        "host": host(module, compiled, parts, where),
        "flops": {"model": useful, "compiled": each * done.flops, "every_branch": each * work(worst).flops},
        "bytes": {"hbm": each * done.hbm_bytes, "host_link": each * done.host_bytes},
        "collectives": [_line(c, each) for c in _merged(sent)],
        "times": times(useful, done, sent, parts.config.train.steps if program == "train" else 0, where),
        "warnings": warnings(sent, parts, where, exchanged_bytes(parts, given)),
        "largest": largest_buffers(module),
        "costliest": [
            {"scope": scope, "cycles_share": round(cycles / done.cycles, 4)}
            for scope, cycles in heapq.nlargest(8, done.cycles_by_scope.items(), key=lambda item: item[1])
            if done.cycles
        ],
        "long_loops": long_loops(module),
        "unknown_loops": len(module.unknown_loops),
        "silent_kernels": done.silent_kernels,
        "compile_seconds": round(compiled.seconds, 1),
    }


def too_large_report(error: TooLarge, given: Mapping[str, Any], parts: Parts, where: Topology) -> dict[str, Any]:
    """Of a program that the compiler gave up: what it said it needs, and the arguments without their tiles."""
    groups = {name: where.chip.devices * size for name, size in argument_groups(given).items()}
    needed = max(where.chip.devices * error.needed, sum(groups.values()))
    groups["temporaries"] = needed - sum(groups.values())
    sizes = {"needed": needed, "reported": needed, "peak": needed, "available": where.chip.hbm_bytes}
    memory = {"groups": groups, **sizes, "fits": False}
    return {"mesh": dict(parts.mesh.shape), "memory": memory, "error": str(error)}


# --- network and time ---


def _merged(sent: list[Collective]) -> list[Collective]:
    """Collectives alike in kind, axes, shape and scope as one line."""
    lines: dict[tuple, Collective] = {}
    for c in sent:
        key = (c.kind, c.axes, c.group_size, c.shape, c.scope)
        before = lines.get(key)
        if before:
            c = Collective(
                **{
                    **vars(c),
                    "times": c.times + before.times,
                    "sent": c.sent + before.sent,
                    "sent_between": c.sent_between + before.sent_between,
                }
            )
        lines[key] = c
    return sorted(lines.values(), key=lambda c: -c.total)


def _line(c: Collective, each: int) -> dict[str, Any]:
    return {
        "kind": c.kind,
        "axes": list(c.axes),
        "group": c.group_size,
        "shape": c.shape,
        "times": c.times,
        "result_bytes": c.result_bytes,
        "sent": each * c.sent,
        "sent_between_slices": each * c.sent_between,
        "scope": c.scope,
    }


def warnings(sent: list[Collective], parts: Parts, where: Topology, exchanged: int) -> list[str]:
    """Collectives as large as what must never travel whole: a device's part of a table, more than a layer's weights.

    `exchanged` bytes are what the exchange of a batch's rows rightly holds: more than a part of a small table, where
    many tokens read it.
    """
    found = []
    tables = parts.store.num_bytes // parts.store.shards
    params = parts.abstract_state().params
    stacks, rest = jax.tree.leaves(params.get("blocks", {})), jax.tree.leaves({**params, "blocks": {}})
    sizes = {x.size // x.shape[0] for x in stacks} | {x.size for x in rest}
    whole_weights = {size * item for size in sizes for item in (2, 4)}
    for c in sent:
        what = f"{c.kind} of {c.shape}, {c.result_bytes:,} bytes, over {'+'.join(c.axes)} ({c.scope})"
        is_of_rows = c.kind in ("all-to-all", "ragged-all-to-all") and c.result_bytes <= exchanged
        if tables and c.result_bytes >= tables / 2 and not is_of_rows and c.result_bytes not in whole_weights:
            found.append(f"table-sized: {what}")
        elif c.kind == "all-gather" and c.result_bytes > 4 * max(sizes):
            found.append(f"more than a layer at once: {what}")
        elif c.is_gather and c.result_bytes > LARGE:
            # libtpu does so where a group is the whole of a slice whose network is a 3D torus (tried on v5p and 7x).
            half = f"cut the weights over half of the slice (train.mesh_data={2 * where.slices}) and it gathers"
            found.append(f"gathered by an all-reduce, at twice the bytes: {what}; {half}")
    return list(dict.fromkeys(found))


def network_seconds(sent: list[Collective], where: Topology) -> float:
    """Every link of the torus dims that a group spans is used, both ways; all-to-all pays for its hops."""
    seconds = 0.0
    for c in sent:
        spanned = [extent for extent in c.extents[: where.chip.torus] if extent > 1]
        links = max(1, len(spanned)) / where.chip.torus
        hops = max(1.0, sum(spanned) / 4) if "all-to-all" in c.kind else 1.0
        seconds += c.sent * hops / (where.chip.ici_rate / where.chip.devices * links)
        seconds += c.sent_between / (where.chip.dcn_rate / where.chip.devices)
    return seconds


def times(useful: float, done: Work, sent: list[Collective], steps: int, where: Topology) -> dict[str, Any]:
    """Seconds of a step by resource and by estimate; MFU is the model's FLOPs over what the chips could do then."""
    chip = where.chip
    by_resource = {
        "compute": chip.devices * done.flops / chip.flops,
        "hbm": chip.devices * done.hbm_bytes / chip.hbm_rate,
        "network": network_seconds(sent, where),
    }
    cycles = done.cycles / (chip.clock_ghz * 1e9) + chip.devices * done.kernel_flops / chip.flops
    estimates = {
        "analytic": useful / chip.flops,
        "overlapped": max(by_resource.values()),
        "in turn": sum(by_resource.values()),
        "compiler": cycles + by_resource["network"] if done.cycles else 0.0,
    }
    return {
        "resources": by_resource,
        "estimates": {
            name: {
                "seconds": seconds,
                "mfu": useful / chip.flops / seconds,
                "chip_hours": steps * seconds * where.chips / 3600,
            }
            for name, seconds in estimates.items()
            if seconds
        },
    }


def long_loops(module: hlo.Module) -> list[dict[str, Any]]:
    found: Counter[tuple[float, str]] = Counter()
    for computation, _ in module.walk():
        for i in computation.instructions.values():
            if i.opcode == "while" and (rounds := hlo.trip_count(module, computation, i) or 0) >= LONG_LOOP:
                found[rounds, i.scope] += 1
    return [{"rounds": rounds, "loops": n, "scope": scope} for (rounds, scope), n in found.most_common()]
