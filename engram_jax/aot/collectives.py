"""What a compiled program sends between devices: which collective, between whom, how many bytes.

`sent` is what one device puts on the network per step, by the ring algorithms (n devices in a group, b bytes held):

    all-gather  (n-1) b        reduce-scatter, all-to-all  (n-1)/n b        all-reduce  2 (n-1)/n b        permute  b
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_jax.aot.hlo import Computation, Instruction, Module

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
Groups = list[tuple[int, ...]]


@dataclass(frozen=True)
class Collective:
    """One collective instruction, with what all its runs in a step send."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes its groups lie along; empty if they are not the groups of any axes."""
    group_size: int
    slices: int
    """Slices of the pod that a group touches: above 1, part of it crosses the slower network between them."""
    shape: str
    result_bytes: int
    """What one run leaves in memory, on one device."""
    times: float
    sent: float
    """Bytes of all runs, over the network within the slice."""
    sent_between: float
    """Bytes of all runs, between slices."""
    scope: str
    is_gather: bool = False
    """An all-reduce that only puts parts side by side, each device's own beside zeros: twice a gather's bytes."""
    extents: tuple[int, ...] = ()
    """Distinct places of a group's members along each dim of the physical network."""

    @property
    def total(self) -> float:
        return self.sent + self.sent_between


@dataclass(frozen=True)
class Network:
    """Who the devices are: the mesh's axes with their sizes, and each device's slice and place, in the mesh's order."""

    mesh: Mapping[str, int]
    slice_of: Sequence[int]
    coords: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, mesh: Any) -> Network:
        devices = list(mesh.devices.flat)
        slices = [int(getattr(d, "slice_index", 0) or 0) for d in devices]
        return cls(dict(mesh.shape), slices, [tuple(getattr(d, "coords", (d.id,))) for d in devices])

    def mesh_of(self, groups: Groups) -> Mapping[str, int]:
        """The axes among these devices: with several slices a program may count those of its own slice alone."""
        slices = len(set(self.slice_of))
        named = max((d for group in groups for d in group), default=0) + 1
        first, *_ = self.mesh
        if slices > 1 and named == len(self.slice_of) // slices:
            return {**self.mesh, first: self.mesh[first] // slices}
        return self.mesh

    @classmethod
    def flat(cls, **mesh: int) -> Network:
        """Of one slice whose devices are in a row."""
        devices = int(np.prod(list(mesh.values())))
        return cls(mesh, [0] * devices, [(k,) for k in range(devices)])


def collectives(module: Module, network: Network) -> list[Collective]:
    """All of them, the largest first."""
    found = []
    for computation, times in module.walk():
        if _is_continued(module, computation):
            continue
        for i in computation.instructions.values():
            kind = i.opcode.removesuffix("-start")
            if kind in KINDS:
                found.append(_collective(kind, module, computation, i, times, network))
            elif i.opcode == "send" and "_xla_megascale_transfer_type" in i.attributes:
                found.append(_between_slices(computation, i, times, len(set(network.slice_of))))
    return sorted(found, key=lambda c: -c.total)


def _is_continued(module: Module, computation: Computation) -> bool:
    """A TPU prints an asynchronous collective again in every fusion that runs beside it, and where it is awaited."""
    if computation.name not in module.fused:
        return False
    caller = module.callers[computation.name].name
    return computation.name.startswith("async_collective_fusion") or caller.startswith("async-collective-done")


def _collective(
    kind: str,
    module: Module,
    computation: Computation,
    i: Instruction,
    times: float,
    network: Network,
) -> Collective:
    slice_of = network.slice_of
    devices = len(slice_of)
    groups = _pairs(i.attributes) if kind == "collective-permute" else replica_groups(i.attributes, devices)
    mesh = network.mesh_of(groups)
    n = max(map(len, groups), default=1)
    held = _held(kind, computation, i)
    payload = sum(shape.bytes for shape in held)
    if kind == "all-reduce" and _is_scattered(computation, i):
        kind = "reduce-scatter"
    result = payload * n if kind == "all-gather" else payload / n if kind == "reduce-scatter" else payload
    slices = max((len({slice_of[d] for d in group}) for group in groups), default=1)
    within, between = sent_bytes(kind, payload, n, slices)
    return Collective(
        kind,
        mesh_axes(groups, mesh, exact=kind != "collective-permute"),
        n,
        slices,
        ", ".join(map(str, held[:3])) + (", ..." if len(held) > 3 else ""),
        int(result),
        times,
        times * within,
        times * between,
        i.scope,
        kind == "all-reduce" and _is_gather(module, computation, i),
        _extents(max(groups, key=len, default=()), network.coords),
    )


def _extents(group: Sequence[int], coords: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(len(set(places)) for places in zip(*(coords[d] for d in group), strict=True))


def sent_bytes(kind: str, payload: float, n: int, slices: int = 1) -> tuple[float, float]:
    """Bytes a device sends within its slice and between slices, of `payload` bytes it holds before.

    With several slices the sum is taken within each, then between them, each device carrying its part.
    """
    if n <= 1:
        return 0.0, 0.0
    within, share = n // slices, (slices - 1) / slices
    if kind == "all-gather":
        return payload * (within - 1) * slices, payload * (slices - 1)
    if kind in ("all-reduce", "reduce-scatter"):
        rounds = 2 if kind == "all-reduce" else 1
        return rounds * payload * (within - 1) / within, rounds * payload / within * share
    if kind in ("all-to-all", "ragged-all-to-all"):
        return payload * (within - 1) / n, payload * share
    return (0.0, payload) if slices > 1 else (payload, 0.0)


def _held(kind: str, computation: Computation, i: Instruction) -> list:
    """Shapes of what one device puts in: the operands', where they can be seen."""
    names = i.operands[:1] if kind in ("ragged-all-to-all", "collective-permute") else i.operands
    return [
        shape for name in names if name in computation.instructions for shape in computation.instructions[name].shapes
    ]


def _is_scattered(computation: Computation, i: Instruction) -> bool:
    """A TPU's reduce-scatter is a fusion of an all-reduce with the slice that is kept of it."""
    return "all-reduce-scatter" in computation.name and all(
        user.opcode == "dynamic-slice" for user in computation.users[i.name]
    )


def _is_gather(module: Module, computation: Computation, i: Instruction) -> bool:
    """Every array of it was made by writing into zeros: how libtpu gathers over all chips of a 3D torus at once."""

    def is_part(name: str) -> bool:
        source, inside = computation.instructions[name], computation
        while source.opcode in ("copy", "bitcast", "copy-done", "copy-start", "fusion"):
            if source.opcode == "fusion":
                inside = module.computations[source.called[0]]
                source = inside.instructions[inside.root]
            else:
                source = inside.operand(source, 0)
        return source.opcode in ("dynamic-update-slice", "pad")

    return bool(i.operands) and all(is_part(name) for name in i.operands if name in computation.instructions)


def _between_slices(computation: Computation, i: Instruction, times: float, slices: int) -> Collective:
    """What is handed to the runtime that connects slices (megascale): a send to the host instead of a collective."""
    kind = (i.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "").lower().replace("_", "-")
    held = computation.operand(i, 0).shapes
    payload = sum(shape.bytes for shape in held)
    share = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1, "one-to-one": 1}
    sent = payload * share.get(kind, (slices - 1) / slices)
    return Collective(
        kind or "send",
        ("data",),
        slices,
        slices,
        ", ".join(map(str, held[:3])),
        payload,
        times,
        0.0,
        times * sent,
        i.scope,
    )


# --- who talks to whom ---


def replica_groups(attributes: str, devices: int) -> Groups:
    """The groups in any of the notations XLA prints; without one, all devices are one group."""
    found = re.search(r"replica_groups=(\S.*)", attributes)
    text = found.group(1) if found else ""
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if text.startswith("{{"):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text.split("}}")[0] + "}")]
    if iota := re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\])(?:T\(([\d,]+)\))?", text):
        shape = (int(iota.group(1)), int(iota.group(2)))
        return [tuple(row) for row in _iota(iota.group(3), iota.group(4)).reshape(shape).tolist()]
    return [tuple(range(devices))]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    sizes = [int(d) for d in dims.strip("[]").split(",")]
    ids = np.arange(int(np.prod(sizes))).reshape(sizes)
    return ids.transpose([int(p) for p in permutation.split(",")]) if permutation else ids


def _mesh_groups(text: str) -> Groups:
    """`mesh['a'=4,'b'=2] {'a'}`: along a, at each place of b. A part of an axis is `'a':(2)2`: size 2, after 2.

    `device_ids=([2,4]T(1,0))`: the mesh's devices are these places of 0, 1, ..., transposed.
    """
    inside, rest = text.removeprefix("mesh[").split("]", 1)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", inside)}
    ids = np.arange(int(np.prod(list(sizes.values()))))
    if order := re.search(r"device_ids=\((\[[\d,]+\])(?:T\(([\d,]+)\))?\)", rest):
        ids = _iota(order.group(1), order.group(2)).reshape(-1)
    named = rest[rest.index("{") : rest.index("}") + 1]
    parts: list[tuple[str, int, int]] = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
    ]
    shape, kept = [], []
    for name, size in sizes.items():
        own = [(before, part) for axis, before, part in parts if axis == name]
        before, part = own[0] if own else (size, 1)
        shape += [before, part, size // (before * part)]
        kept.append(len(shape) - 2)
    others = [d for d in range(len(shape)) if d not in kept]
    group = int(np.prod([shape[d] for d in kept]))
    return [tuple(row) for row in ids.reshape(shape).transpose([*others, *kept]).reshape(-1, group).tolist()]


def _pairs(attributes: str) -> Groups:
    found = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", attributes)
    return [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", found.group(1))] if found else []


def mesh_axes(groups: Groups, mesh: Mapping[str, int], exact: bool = True) -> tuple[str, ...]:
    """The axes along which these groups lie; not `exact`: those along which their members differ."""
    names = [name for name, size in mesh.items() if size > 1]
    ids = np.arange(int(np.prod(list(mesh.values()), initial=1))).reshape(list(mesh.values()))
    if not exact:
        place = {int(d): where for where, d in np.ndenumerate(ids)}
        differ = {k for a, b in groups for k in range(len(mesh)) if place[a][k] != place[b][k]}
        return tuple(name for k, name in enumerate(mesh) if k in differ)
    wanted = {frozenset(group) for group in groups}
    order = list(mesh)
    for number in range(1, len(names) + 1):
        for axes in itertools.combinations(names, number):
            kept = [order.index(axis) for axis in axes]
            others = [k for k in range(len(order)) if k not in kept]
            rows = ids.transpose([*others, *kept]).reshape(-1, int(np.prod([mesh[a] for a in axes])))
            if {frozenset(row) for row in rows.tolist()} == wanted:
                return axes
    return ()
