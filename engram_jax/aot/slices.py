"""How a run is laid out on a slice, where its own settings do not say: the mesh's axes, and sequences at a time.

python -m experiments.run engram_27b --slice v5p-64 ...
"""

from __future__ import annotations

import math

from engram_jax.aot.chips import Topology
from engram_jax.config import RunConfig, replace

ROOM = 0.6
"""Share of a device's memory for what a sequence needs while it is trained on."""
PER_STREAM_BYTE = 2.9
"""Bytes a sequence needs for each byte of residual streams that its blocks hand on (engram_27b, 5 sequences of 4,096 at
a time compiled for v5p-64: 36 GB of temporaries for 12.6 GB)."""
KEPT_BLOCKS = 8
"""Without recomputation the backward pass keeps this many times a block's input."""
UNEVEN = 1 / 32
"""Experts that may be missing for an even share, of all: 55 go to 8 devices as 56 would."""

WEIGHTS_PER_TOKENS = {2: 1, 3: 4}
"""By the dims of the slice's torus: bytes of experts whose gathering costs a step what exchanging one byte of tokens
does. A gather uses the links of every dim, an exchange pays for hops, and its blocks have room that is computed with.
Compiled steps of moe_2e20 tie at 1.05 on v5e-64 and at 4.2 on v5p-256 (docs/pods.md)."""

MIN_PIECE = 1024
"""Positions to which a sequence is cut at most: attention's blocks are hundreds of them, and keys travel for each."""


def laid_out(run: RunConfig, where: Topology) -> RunConfig:
    """The run as one would start it there: weights cut over the slice, as many sequences at a time as have room.

    A sequence lies on one device, or on as few as have room for it and leave the batch divisible. Experts are
    distributed over as many devices as share them (nearly) evenly, where exchanging their tokens costs less than
    gathering their weights; the rest of the cut is fsdp's. On a 3D torus the weights are cut over half of the slice:
    over all of it libtpu gathers by all-reduce, at twice the bytes.
    """
    context = _context(run, where)
    devices = where.devices // where.slices // (2 if where.chip.torus == 3 and where.chips > 8 else 1) // context
    sequences, room = max(1, run.data.batch_size * context // where.devices), context * _room(run, where)
    at_once = max(n for n in range(1, sequences + 1) if sequences % n == 0 and (n == 1 or n <= room))
    moe = run.model.moe
    weights = 3 * moe.n_routed_experts * moe.moe_intermediate_size  # both of these times hidden_size
    tokens = 2 * moe.capacity_factor * moe.num_experts_per_tok * at_once * run.data.seq_len // context
    distributed = weights > tokens * WEIGHTS_PER_TOKENS[where.chip.torus]
    experts = _owners(moe.n_routed_experts, devices) if distributed else 1
    return replace(
        run,
        train__mesh_data=-1,
        train__mesh_fsdp=math.gcd(run.model.hidden_size // context, devices // experts),
        train__mesh_expert=experts,
        train__mesh_context=context,
        train__mesh_tensor=1,
        train__grad_accum=sequences // at_once,
    )


def _owners(experts: int, devices: int) -> int:
    """The most devices for an expert each or several, all alike but for the last; 1 if there are none."""
    return max(n for n in range(1, max(experts, 1) + 1) if devices % n == 0 and -experts % n <= UNEVEN * experts)


def _context(run: RunConfig, where: Topology) -> int:
    """Devices over which a sequence is cut; 1 where no cut gives what is asked of it."""
    room, batch, length, devices = _room(run, where), run.data.batch_size, run.data.seq_len, where.devices
    halvings = range(int(math.log2(devices)) + 1)
    cuts = [n for n in (2**k for k in halvings) if devices % n == 0 and length % n == 0 and length // n >= MIN_PIECE]
    divisible = [n for n in cuts if batch % (devices // n) == 0 and run.model.hidden_size % n == 0]
    return next((n for n in divisible if n * room >= 1), max(divisible, default=1))


def _room(run: RunConfig, where: Topology) -> float:
    """Sequences at a time for which a device has room."""
    return ROOM * where.chip.hbm_bytes / where.chip.devices / sequence_bytes(run)


def sequence_bytes(run: RunConfig) -> float:
    """Bytes of device memory for a sequence that is trained on, beside logits and weights: an estimate."""
    model, dtype_bytes = run.model, 2 if run.model.dtype == "bfloat16" else 4
    streams = model.num_hidden_layers * run.data.seq_len * model.hc_mult * model.hidden_size * dtype_bytes
    return PER_STREAM_BYTE * (1 if model.remat == "full" else KEPT_BLOCKS) * streams
