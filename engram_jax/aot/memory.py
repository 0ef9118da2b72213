"""Memory of a compiled step on one chip and on its host, by group.

Arguments are grouped by their names in the program. Their bytes include the padding of tiles.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from engram_jax.aot import hlo
from engram_jax.aot.chips import Topology
from engram_jax.aot.lowering import Compiled
from engram_jax.aot.shapes import HBM, HOST
from engram_jax.runs.parts import Parts

ARGUMENTS = {
    "state.params": "params",
    "state.opt_state": "optimizer",
    "state.memory.tables": "memory table",
    "state": "other state",
    "batch": "batch and plan",
    "plan": "batch and plan",
    "next_plan": "batch and plan",
    "loaded": "rows read ahead",
    "served.params": "params",
    "served.memory.tables": "memory table",
    "served": "other state",
    "cache": "cache",
}
"""Groups of a step's arguments by the beginning of their names; the longest match counts."""


def hbm(module: hlo.Module, compiled: Compiled, where: Topology) -> dict[str, Any]:
    """Bytes of one chip by group, and whether they fit.

    `fits` is the compiler's verdict: it refuses programs that exceed the chip. `needed` is the size of its buffer
    assignment. `reported`, its memory analysis, is larger: it counts unused memory between arrays twice. Without
    generated code, `reported` and the code's size are unknown, and results count as temporaries.
    """
    entry, each, sizes = module.computations[module.entry], where.chip.devices, compiled.sizes
    groups = Counter(dict.fromkeys(dict.fromkeys(ARGUMENTS.values()), 0))
    for i in entry.instructions.values():
        if i.opcode == "parameter" and i.shapes[0].space != HOST:
            groups[_group(i.scope)] += i.shapes[0].padded_bytes
    arguments = sum(groups.values())
    results = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes) if sizes else 0
    code = sizes.generated_code_size_in_bytes if sizes else 0
    temporaries = compiled.allocated - arguments - results if compiled.allocated else sizes.temp_size_in_bytes
    kept = min(activations(module), temporaries)
    groups |= {"activations": kept, "temporaries": temporaries - kept, "results": results, "code": code}
    groups = {name: each * size for name, size in groups.items() if size}
    analysis = {}
    if sizes:
        analysis["reported"] = each * (arguments + results + code + sizes.temp_size_in_bytes)
        analysis["peak"] = each * (getattr(sizes, "peak_memory_in_bytes", 0) or 0)
    return {
        "groups": groups,
        "needed": sum(groups.values()),
        **analysis,
        "available": where.chip.hbm_bytes,
        "fits": compiled.is_accepted,
    }


def _group(name: str) -> str:
    fitting = [start for start in ARGUMENTS if name == start or name.startswith((f"{start}.", f"{start}["))]
    return ARGUMENTS[max(fitting, key=len)] if fitting else "other"


def argument_groups(named: Mapping[str, Any]) -> Counter[str]:
    """Bytes of a step's arguments on one device by group, from their shapes and shardings alone."""
    groups: Counter[str] = Counter()
    for path, x in jax.tree_util.tree_leaves_with_path(named):
        if x.sharding.memory_kind != "pinned_host":
            name = str(path[0].key) + jax.tree_util.keystr(path[1:])
            groups[_group(name)] += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return groups


def activations(module: hlo.Module) -> int:
    """Bytes in HBM that the forward pass writes and the backward pass reads, by the scopes that autodiff names."""
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
    """The largest arrays that the program makes in HBM, one entry for each shape and scope."""
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


def host(module: hlo.Module, compiled: Compiled, parts: Parts, where: Topology) -> dict[str, Any]:
    """Bytes of one host's memory for the tables. The memory of the data pipeline is not included."""
    each, sizes = where.chip.devices * where.chip.chips_per_host, compiled.sizes
    if sizes:
        in_program = sizes.host_argument_size_in_bytes + sizes.host_output_size_in_bytes
        in_program -= sizes.host_alias_size_in_bytes
    else:  # without code, temporaries are unknown: a step that copies a table would not show here
        entry = module.computations[module.entry].instructions.values()
        arguments = (i.shapes[0] for i in entry if i.opcode == "parameter")
        in_program = sum(shape.padded_bytes for shape in arguments if shape.space == HOST)
    tables = each * in_program
    if not parts.store.placement.in_program:
        tables = parts.store.num_bytes // where.hosts
    needed = tables + (each * sizes.host_temp_size_in_bytes if sizes else 0)
    return {
        "tables": tables,
        "needed": needed,
        "available": where.chip.host_bytes,
        "fits": needed <= where.chip.host_bytes,
    }
