"""What a compiled step needs of its chips, in numbers of one CHIP and one step (a chip of 7x is two jax devices).

Memory is the compiler's: the arguments as they lie, tiles included, and its own temporaries. FLOPs, bytes and
collectives are counted in the program's text, loops with their trip count (work.py, collectives.py). Times are
estimates, each labelled as what it is: nothing here ran on a TPU.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax

from engram_jax.aot import hlo
from engram_jax.aot.chips import Topology
from engram_jax.aot.collectives import Collective, Network, collectives
from engram_jax.aot.shapes import HBM, HOST
from engram_jax.aot.work import Work, work
from engram_jax.counts import flops_per_token
from engram_jax.training.assembly import Parts

ARGUMENTS = {
    "state.params": "params",
    "state.opt_state": "optimizer",
    "state.memory.tables": "memory table",
    "state": "other state",
    "batch": "batch and plan",
    "plan": "batch and plan",
    "next_plan": "batch and plan",
    "held": "rows read ahead",
}
"""Groups of a step's arguments by how their names begin; the longest that fits counts."""
LONG_LOOP = 1000
"""Rounds from which a loop is worth a line: a gather that became one is run row by row."""

LARGE = 2**20
"""Bytes below which no collective is worth a warning."""


@dataclass(frozen=True, eq=False)
class Compiled:
    text: str
    sizes: Any
    seconds: float

    @classmethod
    def of(cls, lowered: jax.stages.Lowered) -> Compiled:
        """Compiles even what exceeds the chip's memory, to say by how much and where."""
        start = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options={"xla_tpu_no_crash_on_oom": "true"})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            compiled = lowered.compile()
        return cls(compiled.as_text() or "", compiled.memory_analysis(), time.perf_counter() - start)


def program_report(program: str, compiled: Compiled, parts: Parts, where: Topology) -> dict[str, Any]:
    module, each = hlo.parse(compiled.text), where.chip.devices
    done, sent = work(module), collectives(module, Network.of(parts.mesh))
    data, share = parts.config.data, {"train": 1.0, "eval": 1 / 3}[program]
    tokens, worst = data.batch_size * data.seq_len, hlo.parse(compiled.text, every_branch=True)
    useful = share * flops_per_token(parts.config.model, data.seq_len) * tokens / where.chips
    return {
        "mesh": dict(parts.mesh.shape),
        "memory": _memory(module, compiled.sizes, where),
        "host": _host(compiled.sizes, parts, where),
        "flops": {"model": useful, "compiled": each * done.flops, "every_branch": each * work(worst).flops},
        "bytes": {"hbm": each * done.hbm_bytes, "host_link": each * done.host_bytes},
        "collectives": [_line(c, each) for c in _merged(sent)],
        "times": times(useful, done, sent, parts.config.train.steps if program == "train" else 0, where),
        "warnings": warnings(sent, parts, where),
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


# --- memory ---


def _memory(module: hlo.Module, sizes: Any, where: Topology) -> dict[str, Any]:
    entry, each = module.computations[module.entry], where.chip.devices
    groups = Counter(dict.fromkeys(dict.fromkeys(ARGUMENTS.values()), 0))
    for i in entry.instructions.values():
        if i.opcode == "parameter" and i.shapes[0].space != HOST:
            groups[_group(i.scope)] += i.shapes[0].padded_bytes
    kept = min(activations(module), sizes.temp_size_in_bytes)
    groups["activations"] = kept
    groups["temporaries"] = sizes.temp_size_in_bytes - kept
    groups["results"] = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    groups["code"] = sizes.generated_code_size_in_bytes
    groups = {name: each * size for name, size in groups.items() if size}
    needed = sum(groups.values())
    return {
        "groups": groups,
        "needed": needed,
        "peak": each * (getattr(sizes, "peak_memory_in_bytes", 0) or 0),
        "available": where.chip.hbm_bytes,
        "fits": needed <= where.chip.hbm_bytes,
    }


def _group(name: str) -> str:
    fitting = [start for start in ARGUMENTS if name == start or name.startswith((f"{start}.", f"{start}["))]
    return ARGUMENTS[max(fitting, key=len)] if fitting else "other"


def activations(module: hlo.Module) -> int:
    """Bytes in HBM that the forward pass writes and the backward pass reads, as autodiff names them."""
    total = 0
    for computation, _ in module.walk():
        if computation.name in module.fused:
            continue
        for i in computation.instructions.values():
            if _pass(i) == "forward" and not i.is_tuple and _goes_backward(computation, i):
                total += sum(s.padded_bytes for s in i.shapes if s.space == HBM)
    return total


def _pass(i: hlo.Instruction) -> str:
    return "backward" if "transpose(" in i.scope else "forward" if "jvp(" in i.scope else ""


def _goes_backward(computation: hlo.Computation, i: hlo.Instruction) -> bool:
    if i.opcode in ("parameter", "constant", "bitcast", "tuple"):
        return False
    for user in computation.users[i.name]:
        if user.opcode == "tuple":
            if any(_pass(u) == "backward" for u in computation.users[user.name]):
                return True
        elif _pass(user) == "backward":
            return True
    return False


def largest_buffers(module: hlo.Module, number: int = 12) -> list[dict[str, Any]]:
    """The largest arrays that the program makes in HBM, one line for each shape and scope."""
    found: dict[tuple[str, str], int] = {}
    for computation, _ in module.walk():
        if computation.name in module.fused:
            continue
        for i in computation.instructions.values():
            if i.opcode in ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "copy-done", "opt-barrier"):
                continue
            for shape in i.shapes:
                if shape.space == HBM:
                    found[f"{shape} {i.opcode}", i.scope] = shape.padded_bytes
    ordered = sorted(found.items(), key=lambda item: -item[1])[:number]
    return [{"array": what, "bytes": size, "scope": scope} for (what, scope), size in ordered]


def _host(sizes: Any, parts: Parts, where: Topology) -> dict[str, Any]:
    """Bytes of one host's memory that the tables take. What the data pipeline takes is not known here."""
    each = where.chip.devices * where.chip.chips_per_host
    tables = each * (
        sizes.host_argument_size_in_bytes + sizes.host_output_size_in_bytes - sizes.host_alias_size_in_bytes
    )
    if not parts.store.placement.in_program:
        tables = parts.store.num_bytes // where.hosts
    needed = tables + each * sizes.host_temp_size_in_bytes
    return {
        "tables": tables,
        "needed": needed,
        "available": where.chip.host_bytes,
        "fits": needed <= where.chip.host_bytes,
    }


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


def warnings(sent: list[Collective], parts: Parts, where: Topology) -> list[str]:
    """Collectives as large as what must never travel whole: a device's part of a table, more than a layer's weights."""
    found = []
    tables = parts.store.num_bytes // parts.store.shards
    params = parts.abstract_state().params
    stacks, rest = jax.tree.leaves(params.get("blocks", {})), jax.tree.leaves({**params, "blocks": {}})
    one_layer = max([x.size // x.shape[0] * 4 for x in stacks] + [x.size * 4 for x in rest])
    for c in sent:
        if tables and c.result_bytes >= tables / 2:
            found.append(f"table-sized: {c.kind} of {c.shape} leaves {c.result_bytes:,} bytes ({c.scope})")
        elif c.kind == "all-gather" and c.result_bytes > one_layer:
            found.append(f"more than a layer at once: {c.kind} of {c.shape}, {c.result_bytes:,} bytes ({c.scope})")
        elif c.is_gather and c.result_bytes > LARGE:
            found.append(
                f"gathered by an all-reduce, at twice the bytes: {c.times:g} x {c.shape} over {'+'.join(c.axes)}"
            )
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


def out_of_memory(message: str, where: Topology) -> dict[str, Any] | None:
    """The report of a program that the compiler gave up, if its message says that memory was why."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    needed = hlo.memory_in(message)
    memory = {"groups": {}, "needed": needed, "peak": needed, "available": where.chip.hbm_bytes, "fits": False}
    return {"memory": memory, "error": message.splitlines()[0]}
