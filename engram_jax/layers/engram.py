"""Engram's reader: rows and residual streams in, an update of the streams out. It knows nothing of tables.

Keys and values are projections of the rows (eq. 3); each stream's gate is the match between its state and its key
(eqs. 4, 6); the gated value passes a short causal convolution (eq. 5).

Legend: B batch, T seq, H rows per token, D hidden size, M residual streams, E memory width (H * head_dim), W kept
positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.layers.parameters import add_parameters
from engram_jax.layers.reader import Reader, newest
from engram_jax.layers.short_conv import gated_short_conv, wide
from engram_jax.registries import READERS
from engram_jax.sharding import in_use, placed, spec

GATE_FLOOR = 1e-6  # below this the published square root is flat, which bounds its slope at 500


def signed_sqrt(score: jax.Array) -> jax.Array:
    """sign(s) sqrt(max(|s|, 1e-6)), and 0 at s = 0: the demo's gate, absent from eqs. 4 and 6."""
    return jnp.sign(score) * jnp.sqrt(jnp.maximum(jnp.abs(score), GATE_FLOOR))


def copysign_sqrt(score: jax.Array) -> jax.Array:
    """`signed_sqrt` with V4.1's sign: 1e-3 at s = 0."""
    return jnp.where(score >= 0, 1.0, -1.0) * jnp.sqrt(jnp.maximum(jnp.abs(score), GATE_FLOOR))


GATES: dict[str, Callable[[jax.Array], jax.Array]] = {"signed_sqrt": signed_sqrt, "copysign_sqrt": copysign_sqrt}
"""By the name in `EngramVariant.gate`."""


def _gate_scores(x_BTMD: jax.Array, key_BTMD: jax.Array, gain_MD: jax.Array, eps: float) -> jax.Array:
    """RMSNorm(x) . RMSNorm(key) / sqrt(D) per stream (eq. 6), with the product of the two norms' gains: [B, T, M].

    Three sums over D and no normalised copy of either operand; x and key are read once in each direction.
    """
    return _gate_scores_forward(x_BTMD, key_BTMD, gain_MD, eps)[0]


def _gate_scores_forward(x_BTMD, key_BTMD, gain_MD, eps):
    x, key, gain = wide(x_BTMD), wide(key_BTMD), wide(gain_MD)[None, None]
    width = x.shape[-1]
    x_scale = jax.lax.rsqrt(jnp.mean(x * x, -1) + eps)
    key_scale = jax.lax.rsqrt(jnp.mean(key * key, -1) + eps)
    score = jnp.sum(x * key * gain, -1) * x_scale * key_scale * width**-0.5
    return score, (x_BTMD, key_BTMD, gain_MD, x_scale, key_scale, score)


def _gate_scores_backward(eps, residuals, d_score):
    x_BTMD, key_BTMD, gain_MD, x_scale, key_scale, score = residuals
    x, key, gain = wide(x_BTMD), wide(key_BTMD), wide(gain_MD)[None, None]
    width = x.shape[-1]
    both = (d_score * x_scale * key_scale * width**-0.5)[..., None]
    along_x = (d_score * score * x_scale**2 / width)[..., None]
    along_key = (d_score * score * key_scale**2 / width)[..., None]
    d_x = both * key * gain - along_x * x
    d_key = both * x * gain - along_key * key
    d_gain = jnp.sum(both * x * key, (0, 1))
    return d_x.astype(x_BTMD.dtype), d_key.astype(key_BTMD.dtype), d_gain.astype(gain_MD.dtype)


gate_scores = jax.custom_vjp(_gate_scores, nondiff_argnums=(3,))
gate_scores.defvjp(_gate_scores_forward, _gate_scores_backward)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatedValues:
    """The newest inputs of an Engram layer's convolution."""

    gate_BWM: jax.Array
    value_BWD: jax.Array


class EngramReader(Reader):
    """One Engram layer of the paper: `update_BTMD = reader(x_BTMD, rows_BTHd, segment_ids_BT)`.

    Zero rows give exactly zero output (without `engram_bias`). The convolution starts at zero, so that the reader
    starts as the gated value alone (paper, section 2.4). Readers that lack a part are in layers/engram_readers.py.
    """

    has_gates: ClassVar[bool] = True

    key_value_emd: nnx.Param
    """A key for each gated state, then the one value that all states share."""
    key_value_bias_md: nnx.Param
    query_norm: nnx.Param
    key_norm: nnx.Param
    conv_norm: nnx.Param
    conv_kmd: nnx.Param

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        engram = config.engram
        self.config, self.kernel_size, self.has_bias = config, engram.engram_kernel_size, engram.engram_bias
        add_parameters(self, READERS[engram.engram_variant].weights(config), rngs)

    def __call__(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        def update(reader: EngramReader, x_BTMD: jax.Array, rows_BTHd: jax.Array) -> jax.Array:
            return reader.read(x_BTMD, rows_BTHd, segment_ids_BT)[0]

        if self.config.remat == "full":
            update = jax.checkpoint(update)
        return update(self, x_BTMD, rows_BTHd)

    def read(
        self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The update of the streams and the gates [B, T, M] that made it."""
        gate_BTM, value_BTD = self.gated_value(x_BTMD, rows_BTHd)
        segments_BT = None if self.config.engram.engram_cross_documents else segment_ids_BT
        y_BTMD = self.convolved(gate_BTM, value_BTD, segments_BT)
        return self.written(x_BTMD, y_BTMD).astype(x_BTMD.dtype), gate_BTM

    def written(self, x_BTMD: jax.Array, y_BTMD: jax.Array) -> jax.Array:
        """The update of the streams x, made of y, the result of `convolved`."""
        return y_BTMD

    def gated_value(self, x_BTMD: jax.Array, rows_BTHd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gates [B, T, M] and the one value of all streams [B, T, D], eqs. 3 to 6."""
        keys_value_BTMD = self.keys_value(rows_BTHd, x_BTMD.dtype)
        keys_BTMD, value_BTD = keys_value_BTMD[:, :, :-1], keys_value_BTMD[:, :, -1]
        gain_MD = self.query_norm[...] * self.key_norm[...]
        scores_BTM = gate_scores(x_BTMD, keys_BTMD, gain_MD, self.config.rms_norm_eps)
        return jax.nn.sigmoid(self.signed_score(scores_BTM)), value_BTD

    def signed_score(self, score_BTM: jax.Array) -> jax.Array:
        """The gate before its sigmoid, as the variant was published: [B, T, M]."""
        return GATES[READERS[self.config.engram.engram_variant].gate](score_BTM)

    def keys_value(self, rows_BTHd: jax.Array, dtype: Any) -> jax.Array:
        """The keys, then the value, eq. 3: [B, T, keys + 1, D]."""
        memory_BTE = rows_BTHd.reshape(*rows_BTHd.shape[:2], -1).astype(dtype)
        keys_value_BTMD = jnp.einsum(
            "bte,emd->btmd",
            memory_BTE,
            in_use(self.key_value_emd[...], "memory", "streams", "embed", dtype=dtype),
            out_sharding=spec("batch", "seq", "streams", "act"),
        )
        if self.has_bias:
            keys_value_BTMD = keys_value_BTMD + self.key_value_bias_md[...].astype(dtype)[None, None]
        return keys_value_BTMD

    def convolved(self, gate_BTM: jax.Array, value_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """The update of the streams: the gated value, and its short convolution inside segments. [B, T, M, D]."""
        if not self.kernel_size:
            return gate_BTM[..., None] * value_BTD[:, :, None, :]
        engram = self.config.engram
        dilation, norm_eps = engram.engram_max_ngram_size, engram.engram_conv_norm_eps
        mesh = jax.sharding.get_abstract_mesh()
        cut = not mesh.empty and mesh.shape.get("context", 1) > 1

        def conv(gate_BTM, value_BTD, gain_MD, conv_KMD, segments_BT):
            return gated_short_conv(gate_BTM, value_BTD, gain_MD, conv_KMD, segments_BT, dilation, norm_eps, cut)

        arrays = (gate_BTM, value_BTD, self.conv_norm[...], self.conv_kmd[...], segments_BT)
        if cut:
            tokens, whole = spec("batch", "seq", None), spec()
            specs = (tokens, tokens, whole, whole, spec("batch", "seq"))
            arrays = tuple(x if x is None else jax.reshard(x, s) for x, s in zip(arrays, specs, strict=True))
            conv = jax.shard_map(conv, in_specs=specs, out_specs=spec("batch", "seq", None, None), check_vma=False)
        return conv(*arrays)

    @staticmethod
    def new_cache(config: ModelConfig, batch: int, spare: int) -> GatedValues | None:
        reach = config.engram.reach
        if not reach:
            return None
        kept, wide = spec("batch", None, None), jnp.promote_types(config.dtype, jnp.float32)
        gate = jnp.zeros((batch, reach + spare, config.engram_branches), wide, out_sharding=kept)
        value = jnp.zeros((batch, reach + spare, config.hidden_size), config.dtype, out_sharding=kept)
        return GatedValues(gate, value)

    def extend(
        self, x_BTMD: jax.Array, rows_BTHd: jax.Array, count_B: jax.Array, cache: GatedValues | None
    ) -> tuple[jax.Array, GatedValues | None]:
        if cache is None:
            return self(x_BTMD, rows_BTHd), None
        reach = self.config.engram.reach
        gate_BTM, value_BTD = self.gated_value(x_BTMD, rows_BTHd)
        gate_BTM, value_BTD = (placed(x, "batch", None, None) for x in (gate_BTM, value_BTD))
        first = cache.gate_BWM.shape[1] - reach
        gates, values = (
            jnp.concatenate([old[:, first:], new.astype(old.dtype)], axis=1)
            for old, new in ((cache.gate_BWM, gate_BTM), (cache.value_BWD, value_BTD))
        )
        y_BTMD = placed(self.convolved(gates, values, None)[:, reach:], "batch", "seq", None, "act")
        update_BTMD = self.written(x_BTMD, y_BTMD).astype(x_BTMD.dtype)
        cache = GatedValues(newest(cache.gate_BWM, gate_BTM, count_B), newest(cache.value_BWD, value_BTD, count_B))
        return update_BTMD, cache
