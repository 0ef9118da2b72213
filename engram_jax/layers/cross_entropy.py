"""Output projection and cross-entropy in one function, with the backward pass written out.

Two forms have equal values: `token_losses` keeps all logits for the backward pass, `chunked_token_losses` has the
logits of one chunk at a time.

Legend: B batch, T seq, D hidden size, V vocabulary; N chunks of P positions. Lower case: a device's own part.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from engram_jax.sharding import BATCH, LOGICAL_TO_MESH, in_use, sharding_of, spec

NO_LOSS = -1
"""A target that is not scored."""


def output_logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Logits [B, T, V], float32 or wider."""
    return jnp.einsum(
        "btd,dv->btv",
        hidden_BTD,
        in_use(head_DV, "embed", "vocab", dtype=hidden_BTD.dtype),
        out_sharding=spec("batch", "seq", "vocab"),
        preferred_element_type=jnp.promote_types(hidden_BTD.dtype, jnp.float32),
    )


@jax.custom_vjp
def token_losses(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Nats at each position [B, T], float32 or wider; 0 where the target is negative: `NO_LOSS`, or others' -100.

    Autodiff would keep a mask of the logits' size and transpose the logits' gradient in memory: 2.3 times the time on
    CPU, for 4,096 tokens and 4,096 entries of vocabulary.
    """
    return _forward(hidden_BTD, head_DV, targets_BT)[0]


def _forward(hidden_BTD, head_DV, targets_BT):
    logits_BTV = output_logits(hidden_BTD, head_DV)
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.sum(jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0), axis=-1)
    losses_BT = jnp.where(targets_BT < 0, 0, log_sum_BT - target_BT)
    return losses_BT, (hidden_BTD, head_DV, targets_BT, logits_BTV, log_sum_BT)


def _backward(residuals, d_losses_BT):
    hidden_BTD, head_DV, targets_BT, logits_BTV, log_sum_BT = residuals
    weight_BT1 = jnp.where(targets_BT < 0, 0, d_losses_BT)[..., None]
    probability_BTV = jnp.exp(logits_BTV - log_sum_BT[..., None])
    d_logits_BTV = weight_BT1 * (probability_BTV - _is_target(logits_BTV, targets_BT))
    d_logits_BTV = d_logits_BTV.astype(hidden_BTD.dtype)
    head = in_use(head_DV, "embed", "vocab", dtype=hidden_BTD.dtype)
    d_hidden = jnp.einsum("btv,dv->btd", d_logits_BTV, head, out_sharding=sharding_of(hidden_BTD))
    # hidden first: the other order would need the logits' gradient transposed.
    wide = jnp.promote_types(head_DV.dtype, jnp.float32)
    d_head = jnp.einsum(
        "btd,btv->dv", hidden_BTD, d_logits_BTV, out_sharding=sharding_of(head_DV), preferred_element_type=wide
    )
    return d_hidden, d_head.astype(head_DV.dtype), None


token_losses.defvjp(_forward, _backward)


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])[None, None]


# --- a chunk at a time ---


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_token_losses(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunk_len: int) -> jax.Array:
    """`token_losses`, with logits for `chunk_len` positions of a sequence at a time, recomputed in the backward pass.

    The loop runs on each device's own tokens, so the head is gathered once in each direction, and its gradient is
    exchanged once. With an exchange per chunk, devices sent 8 times as much, and XLA kept the logits' gradients of all
    chunks until the end of the backward pass (10.6 GB for 5 sequences of 4,096 and 129,280 entries of vocabulary).
    """
    return _chunked_forward(hidden_BTD, head_DV, targets_BT, chunk_len)[0]


def _chunked_forward(hidden_BTD, head_DV, targets_BT, chunk_len):
    def local(hidden_btd, head_dv, targets_bt):
        head_Dv, length = _whole(head_dv.astype(hidden_btd.dtype)), targets_bt.shape[1]

        def one_chunk(_, chunk):
            hidden_bPd, targets_bP = chunk
            logits_bPv = _logits(hidden_bPd, head_Dv)
            largest_bP = _over_vocab(jax.lax.pmax, jnp.max(logits_bPv, axis=-1))
            sum_bP = _over_vocab(jax.lax.psum, jnp.sum(jnp.exp(logits_bPv - largest_bP[..., None]), axis=-1))
            own_bP = jnp.sum(jnp.where(_is_local_target(logits_bPv, targets_bP), logits_bPv, 0), axis=-1)
            log_sum_bP = largest_bP + jnp.log(sum_bP)
            losses_bP = jnp.where(targets_bP < 0, 0, log_sum_bP - _over_vocab(jax.lax.psum, own_bP))
            return None, (losses_bP, log_sum_bP)

        chunks = _to_chunks(hidden_btd, chunk_len), _to_chunks(targets_bt, chunk_len, NO_LOSS)
        _, (losses_NbP, log_sum_NbP) = jax.lax.scan(one_chunk, None, chunks)
        return _from_chunks(losses_NbP, length), _from_chunks(log_sum_NbP, length)

    tokens, states, head = spec("batch", "seq"), spec("batch", "seq", None), spec("embed", "vocab")
    run = _on_devices(local, (states, head, tokens), (tokens, tokens))
    losses_BT, log_sum_BT = run(hidden_BTD, head_DV, targets_BT)
    return losses_BT, (hidden_BTD, head_DV, targets_BT, log_sum_BT)


def _chunked_backward(chunk_len, residuals, d_losses_BT):
    hidden_BTD, head_DV, targets_BT, log_sum_BT = residuals
    wide = jnp.promote_types(head_DV.dtype, jnp.float32)

    def local(hidden_btd, head_dv, targets_bt, log_sum_bt, d_losses_bt):
        head_Dv, length = _whole(head_dv.astype(hidden_btd.dtype)), targets_bt.shape[1]
        weight_bt = jnp.where(targets_bt < 0, 0, d_losses_bt)

        def one_chunk(d_head_Dv, chunk):
            hidden_bPd, targets_bP, log_sum_bP, weight_bP = chunk
            logits_bPv = _logits(hidden_bPd, head_Dv)
            probability_bPv = jnp.exp(logits_bPv - log_sum_bP[..., None])
            d_logits_bPv = weight_bP[..., None] * (probability_bPv - _is_local_target(logits_bPv, targets_bP))
            d_logits_bPv = d_logits_bPv.astype(hidden_bPd.dtype)
            d_hidden_bPd = _over_vocab(jax.lax.psum, jnp.einsum("btv,dv->btd", d_logits_bPv, head_Dv))
            # hidden first: the other order would need the logits' gradient transposed.
            own_Dv = jnp.einsum("btd,btv->dv", hidden_bPd, d_logits_bPv, preferred_element_type=wide)
            return d_head_Dv + own_Dv, d_hidden_bPd

        chunks = (
            _to_chunks(hidden_btd, chunk_len),
            _to_chunks(targets_bt, chunk_len, NO_LOSS),
            _to_chunks(log_sum_bt, chunk_len),
            _to_chunks(weight_bt, chunk_len),
        )
        d_head_Dv, d_hidden_NbPd = jax.lax.scan(one_chunk, jnp.zeros(head_Dv.shape, wide), chunks)
        return _from_chunks(d_hidden_NbPd, length), _cut(d_head_Dv)

    tokens, states, head = spec("batch", "seq"), spec("batch", "seq", None), spec("embed", "vocab")
    run = _on_devices(local, (states, head, tokens, tokens, tokens), (states, head))
    d_hidden_BTD, d_head_DV = run(hidden_BTD, head_DV, targets_BT, log_sum_BT, d_losses_BT)
    return d_hidden_BTD, d_head_DV.astype(head_DV.dtype), None


chunked_token_losses.defvjp(_chunked_forward, _chunked_backward)


def _on_devices(local, in_specs, out_specs):
    """`local` as a function of each device's part; `local` itself outside a mesh."""
    if in_specs[0] is None:
        return local
    run = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return lambda *arrays: run(*(jax.reshard(x, s) for x, s in zip(arrays, in_specs, strict=True)))


def _in_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def _whole(head_dv: jax.Array) -> jax.Array:
    """The head with all rows, gathered from the devices that store parts of them: [D, v]."""
    return jax.lax.all_gather(head_dv, LOGICAL_TO_MESH["embed"], axis=0, tiled=True) if _in_mesh() else head_dv


def _cut(d_head_Dv: jax.Array) -> jax.Array:
    """The transpose of `_whole`: summed over all tokens, each device its part [d, v]."""
    if not _in_mesh():
        return d_head_Dv
    embed: tuple[str, ...] = LOGICAL_TO_MESH["embed"]  # type: ignore[assignment]
    d_head_dv = jax.lax.psum_scatter(d_head_Dv, embed, scatter_dimension=0, tiled=True)
    return jax.lax.psum(d_head_dv, [axis for axis in BATCH if axis not in embed])


def _over_vocab(reduce, x: jax.Array) -> jax.Array:
    return reduce(x, LOGICAL_TO_MESH["vocab"]) if _in_mesh() else x


def _logits(hidden_bPd: jax.Array, head_Dv: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden_bPd.dtype, jnp.float32)
    return jnp.einsum("btd,dv->btv", hidden_bPd, head_Dv, preferred_element_type=wide)


def _is_local_target(logits_bPv: jax.Array, targets_bP: jax.Array) -> jax.Array:
    first = jax.lax.axis_index(LOGICAL_TO_MESH["vocab"]) * logits_bPv.shape[-1] if _in_mesh() else 0
    return _is_target(logits_bPv, targets_bP - first)


def _to_chunks(x_bt: jax.Array, chunk_len: int, fill: int = 0) -> jax.Array:
    """[b, t, ...] -> [N, b, P, ...]; the last chunk is padded."""
    length = x_bt.shape[1]
    number = -(-length // chunk_len)
    room = [(0, 0), (0, number * chunk_len - length), *[(0, 0)] * (x_bt.ndim - 2)]
    x_bNP = jnp.pad(x_bt, room, constant_values=fill).reshape(len(x_bt), number, chunk_len, *x_bt.shape[2:])
    return jnp.moveaxis(x_bNP, 1, 0)


def _from_chunks(x_NbP: jax.Array, length: int) -> jax.Array:
    x_bNP = jnp.moveaxis(x_NbP, 0, 1)
    return x_bNP.reshape(len(x_bNP), -1, *x_bNP.shape[3:])[:, :length]
