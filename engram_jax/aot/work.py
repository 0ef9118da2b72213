"""What a compiled program does on one device per step: FLOPs, bytes through HBM, the compiler's own cycles.

FLOPs   2 per multiply-add of every matrix product (a TPU writes them as convolutions), and what a kernel declares
bytes   every operand read once and every result written once by each operation that is not inside a fusion; of an
        operand that is only sliced or gathered, the part that is read; nothing for what lies in VMEM
cycles  `estimated_cycles`, which the TPU compiler writes beside its operations (not beside collectives)
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from engram_jax.aot.collectives import KINDS
from engram_jax.aot.hlo import Computation, Instruction, Module
from engram_jax.aot.shapes import HBM, HOST, Shape

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "async-start", "async-update", "async-done", "send", "recv"),
    *("iota", "domain", "add-dependency", "rng-get-and-update-state"),
}
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "SPMD")
_PARTS = ("dynamic-slice", "slice", "gather")
_SEEN_THROUGH = ("bitcast", "reshape", "copy", "convert")


_UNKNOWN_CYCLES = 2**60
"""What the compiler writes where it cannot tell: on SparseCore, for one."""


@dataclass
class Work:
    flops: float = 0.0
    kernel_flops: float = 0.0
    """Of these, in custom kernels, for which the compiler estimates no cycles."""
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    """Between HBM and the host's memory."""
    cycles: float = 0.0
    flops_by_scope: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    cycles_by_scope: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    silent_kernels: list[str] = field(default_factory=list)
    """Custom kernels that don't declare their FLOPs, and count as none."""


def work(module: Module) -> Work:
    total = Work()
    for computation, times in module.walk():
        is_fused = computation.name in module.fused
        for i in computation.instructions.values():
            flops, is_silent = _flops(computation, i)
            if is_silent and i.name not in total.silent_kernels:
                total.silent_kernels.append(i.name)
            total.flops += times * flops
            total.kernel_flops += times * flops * (i.opcode == "custom-call")
            total.flops_by_scope[_scope(module, computation, i)] += times * flops
            if is_fused:
                continue
            cycles = int(i.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            if cycles < _UNKNOWN_CYCLES:
                total.cycles += times * cycles
                total.cycles_by_scope[_scope(module, computation, i)] += times * cycles
            total.hbm_bytes += times * hbm_bytes(module, computation, i)
            total.host_bytes += times * _host_bytes(computation, i)
    return total


def _scope(module: Module, computation: Computation, i: Instruction) -> str:
    """Where it comes from. Fused instructions and fusions that lost their name borrow one from each other."""
    caller = module.callers.get(computation.name)
    inside = module.computations[i.called[0]].instructions.values() if i.opcode == "fusion" else []
    names = [i.scope, *([caller.scope] if caller else []), *(inner.scope for inner in inside)]
    return next(filter(None, names), f"{i.name} {i.shapes[0] if i.shapes else ''}")


# --- FLOPs ---


def _flops(computation: Computation, i: Instruction) -> tuple[float, bool]:
    """(FLOPs of one run, whether it is a kernel that doesn't say)."""
    if i.opcode == "dot":
        left = computation.operand(i, 0).shapes[0]
        contracted = [int(d) for d in (i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",") if d]
        return 2.0 * i.shapes[0].size * math.prod(left.dims[d] for d in contracted), False
    if i.opcode == "ragged-dot":
        return 2.0 * i.shapes[0].size * computation.operand(i, 0).shapes[0].dims[-1], False
    if i.opcode == "convolution":
        return _convolution(i, computation.operand(i, 0).shapes[0], computation.operand(i, 1).shapes[0]), False
    if i.opcode == "custom-call" and i.attribute(r'custom_call_target="(tpu_custom_call|Mosaic\w*|__gpu\w*)"'):
        if "splash_m" in i.name:
            return _splash(computation, i), False
        declared = i.attribute(r'cost_estimate\\?"?:\s*\{[^}]*?flops\\?"?:\s*\\?"?(\d+)')
        is_arithmetic = any(shape.dtype.startswith(("f", "bf")) for shape in i.shapes)
        return float(declared or 0), declared is None and is_arithmetic
    return 0.0, False


def _splash(computation: Computation, i: Instruction) -> float:
    """jax's causal attention kernel, which declares nothing: of q_BNTH, k_BGSH, v_BGSV half the T x S pairs.

    Of a single sequence they have no B. Forward two products, of widths H and V; backward five: the scores again, and
    the gradients of p, v, k and q.
    """
    operands = [computation.instructions[name].shapes[0] for name in i.operands]
    arrays = [shape.dims for shape in operands if shape.dtype.startswith(("f", "bf"))]
    rank = max(map(len, arrays), default=0)
    found = [dims for dims in arrays if len(dims) == rank >= 3][:3]
    if len(found) < 3:
        return 0.0
    (*B, N, T, H), (*_, S, _), (*_, V) = found
    widths = H + V if "fwd" in i.name else 3 * H + 2 * V
    return 2.0 * math.prod(B) * N * T * S * widths / 2


def _convolution(i: Instruction, left: Shape, right: Shape) -> float:
    """2 x batch x features out x features in x the places where kernel and input meet.

    A batched product is a convolution too: its batch is a spatial dim of which padding or dilation leaves one place.
    """
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute(r"dim_labels=([\w\->]+)") or "")
    if not labels:
        return 0.0
    left_dims, right_dims, out_dims = labels.groups()
    window = i.attribute(r"window=\{([^}]*)\}") or ""

    def per_dim(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=(\S+)", window)
        spatial = sum(c.isdigit() for c in out_dims)
        return found.group(1).split("x") if found else [default] * spatial

    pads, strides = per_dim("pad", "0_0"), per_dim("stride", "1")
    left_dilation, right_dilation = per_dim("lhs_dilate", "1"), per_dim("rhs_dilate", "1")
    meetings = 1.0
    for d in sorted(c for c in out_dims if c.isdigit()):
        k = int(d)
        meetings *= _meetings(
            i.shapes[0].dims[out_dims.index(d)],
            right.dims[right_dims.index(d)],
            left.dims[left_dims.index(d)],
            int(strides[k]),
            int(pads[k].split("_")[0]),
            int(left_dilation[k]),
            int(right_dilation[k]),
        )
    out = i.shapes[0].dims
    batch_and_features = out[out_dims.index("b")] * out[out_dims.index("f")]
    return 2.0 * batch_and_features * right.dims[right_dims.index("i")] * meetings  # the kernel's i is that of a group


@cache
def _meetings(out: int, kernel: int, size: int, stride: int, pad: int, left_dilation: int, right_dilation: int) -> int:
    """Pairs (place in the result, place in the kernel) that fall on a number of the input."""
    starts, last = np.arange(out) * stride - pad, (size - 1) * left_dilation
    number = 0
    for k in range(kernel):
        places = starts + k * right_dilation
        number += int(np.count_nonzero((places >= 0) & (places <= last) & (places % left_dilation == 0)))
    return number


# --- bytes ---


def hbm_bytes(module: Module, computation: Computation, i: Instruction) -> float:
    """Bytes that one run moves from and to HBM."""
    kind = i.opcode.removesuffix("-start")
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or kind in KINDS:
        return 0.0
    if i.opcode == "custom-call" and any(word in i.attributes for word in _NO_WORK):
        return 0.0
    if i.opcode in ("copy-start", "slice-start"):  # (to, from, flag) and (from, to, flag): each side in its own memory
        moved = min(s.padded_bytes for s in i.shapes[:2])
        return float(sum(moved for s in i.shapes[:2] if s.space == HBM and s.dims))
    inner = module.computations[i.called[0]] if i.opcode == "fusion" else None
    if inner is None:
        reads = sum(_read_by(computation, i, place) for place in range(len(i.operands)))
        return reads + _written_by(computation, i)
    reads = 0.0
    for place, name in enumerate(i.operands):
        parameter = inner.parameters.get(place)
        reads += _read_inside(module, inner, parameter, _in_hbm(computation.instructions[name])) if parameter else 0.0
    roots = inner.instructions[inner.root]
    outputs = [inner.instructions[n] for n in roots.operands] if roots.opcode == "tuple" else [roots]
    writes = sum(_written_inside(module, inner, out, shape) for out, shape in zip(outputs, i.shapes, strict=False))
    return reads + writes


def _in_hbm(i: Instruction) -> float:
    return float(sum(shape.padded_bytes for shape in i.shapes if shape.space == HBM))


def _read_by(computation: Computation, i: Instruction, place: int) -> float:
    source = computation.instructions.get(i.operands[place])
    if source is None:
        return 0.0
    whole = _in_hbm(source)
    if place == 0 and i.opcode in _PARTS:
        return min(whole, float(sum(s.padded_bytes for s in i.shapes)))
    if place == 0 and i.opcode in ("dynamic-update-slice", "scatter"):
        return 0.0
    return whole


def _written_by(computation: Computation, i: Instruction) -> float:
    if i.opcode == "dynamic-update-slice":
        return min(
            _in_hbm(i), _in_hbm(computation.operand(i, 1)) or float(computation.operand(i, 1).shapes[0].padded_bytes)
        )
    if i.opcode == "scatter":
        return min(_in_hbm(i), 2 * float(computation.instructions[i.operands[-1]].shapes[0].padded_bytes))
    return _in_hbm(i)


def _read_inside(module: Module, inner: Computation, name: str, whole: float) -> float:
    """Of a fusion's operand, what is read: all of it, unless every use is a slice or an update in place."""
    if not whole:
        return 0.0
    read = 0.0
    for user in inner.users[name]:
        if user.opcode in _PARTS and user.operands[0] == name:
            read += sum(s.padded_bytes for s in user.shapes)
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            continue
        elif user.opcode in _SEEN_THROUGH:
            read += _read_inside(module, inner, user.name, whole)
        elif user.opcode == "fusion":
            nested = module.computations[user.called[0]]
            read += _read_inside(module, nested, nested.parameters[user.operands.index(name)], whole)
        else:
            return whole
    return min(read, whole)


def _written_inside(module: Module, inner: Computation, out: Instruction, shape: Shape) -> float:
    """Of a fusion's result, what is written: all of it, or the update where one is made in place."""
    if shape.space != HBM:
        return 0.0
    while out.operands and (out.opcode in _SEEN_THROUGH or out.opcode == "fusion"):
        if out.opcode == "fusion":
            inner = module.computations[out.called[0]]
            out = inner.instructions[inner.root]
        else:
            out = inner.operand(out, 0)
    if out.opcode == "dynamic-update-slice":
        return float(min(shape.padded_bytes, inner.operand(out, 1).shapes[0].padded_bytes))
    if out.opcode == "scatter":  # each row is read and written
        return float(min(shape.padded_bytes, 2 * inner.instructions[out.operands[-1]].shapes[0].padded_bytes))
    return float(shape.padded_bytes)


def _host_bytes(computation: Computation, i: Instruction) -> float:
    """Copies whose two sides lie in different memories, one of them the host's."""
    if i.opcode == "copy-start" and len(i.shapes) >= 2:
        spaces = {s.space for s in i.shapes[:2]}
        return float(i.shapes[0].bytes) if HOST in spaces and len(spaces) == 2 else 0.0
    return 0.0
