"""Causal attention on TPU: jax's splash attention kernel (Pallas), on every device's own heads and positions.

No T x S array exists; blocks of keys that lie ahead of a block of queries are not computed.

Letters: B batch, T query position, S key position, N query head, G key-value head, H query-key width, V value width.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.config import require
from engram_jax.sharding import spec

BLOCK = 512
"""Queries and keys to a block."""
BACKWARD_BLOCKS, BACKWARD_BLOCK = 8, 2048
"""Blocks of keys in the backward pass, at most, as far as none is larger than the second number: 4,096 do not fit the
vector memory of v5e and v5p."""


def splash_attention(
    q_BTNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGV: jax.Array,
    segment_ids_BT: jax.Array | None,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k) v -> y_BTNV in `q.dtype`, causal and within segments; S = T. scale: 1/sqrt(H) if None.

    Under a mesh, heads may be cut over `tensor` and the positions of q over `context`; k and v have all positions.
    `interpret`: True runs the kernel without a TPU, slowly.

    Raises:
      ConfigError: a device's positions are not a multiple of 128.
    """
    mesh = jax.sharding.get_abstract_mesh()
    context, tensor = (1, 1) if mesh.empty else (mesh.shape["context"], mesh.shape["tensor"])
    length, heads = q_BTNH.shape[1:3]
    require(
        length // context % 128 == 0,
        f"data.seq_len={length} over train.mesh_context={context} is not a multiple of 128, which attention on TPU "
        "needs: choose such a length.",
    )
    kernel = _kernel(length, heads, context, tensor, interpret)
    q_BNTH = (q_BTNH * (q_BTNH.shape[-1] ** -0.5 if scale is None else scale)).swapaxes(1, 2)
    k_BGSH, v_BGSV = k_BSGH.swapaxes(1, 2), v_BSGV.swapaxes(1, 2)

    def local(kernel, q_BNTH, k_BGSH, v_BGSV, *segments):
        segment_ids = splash.SegmentIds(*segments) if segments else None
        return jax.vmap(kernel)(q_BNTH, k_BGSH, v_BGSV, segment_ids)

    arrays = [q_BNTH, k_BGSH, v_BGSV]
    arrays += [] if segment_ids_BT is None else [segment_ids_BT, segment_ids_BT]
    if not mesh.empty:
        kernel_specs = kernel.manual_sharding_spec(NamedSharding(mesh, P("tensor", "context")))
        queries, keys = spec("batch", "heads", "seq", None), spec("batch", "heads", None, None)
        specs = [queries, keys, keys, spec("batch", "seq"), spec("batch", None)][: len(arrays)]
        arrays = [jax.reshard(x, s) for x, s in zip(arrays, specs, strict=True)]
        kernel = jax.tree.map(jax.reshard, kernel, kernel_specs)
        # check_vma=False: a Pallas call does not say over which axes its result varies.
        local = jax.shard_map(local, in_specs=(kernel_specs, *specs), out_specs=queries, check_vma=False)
    y_BNTV: Any = local(kernel, *arrays)
    return y_BNTV.swapaxes(1, 2)


def _backward_block(length: int, block: int) -> int:
    """Keys to a block of the backward pass, a multiple of `block` that divides `length`.

    The fused kernel writes the gradient of all queries once for every block of keys, and sums afterwards: at 32,768
    positions over two devices (32 heads) 18.6 GB in blocks of 512, 5.7 GB in blocks of 2,048, by compiling for v5p.
    """
    fitting = [keys for keys in range(block, BACKWARD_BLOCK + 1, block) if length % keys == 0]
    return next((keys for keys in fitting if length // keys <= BACKWARD_BLOCKS), fitting[-1])


def _kernel(length: int, heads: int, context: int, tensor: int, interpret: bool) -> splash.SplashAttentionKernel:
    block = max(b for b in (128, 256, BLOCK) if length // context % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=_backward_block(length, block),
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=tensor, q_seq_shards=context, interpret=interpret
    )
