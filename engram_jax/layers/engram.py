"""THE READER: rows and residual streams in, an update of the streams out. It knows nothing of tables.

Keys and values are projections of the rows (eq. 3); each stream's gate is the match between its state and its key
(eqs. 4, 6); the gated value passes a short causal convolution (eq. 5).

Legend: B batch, T seq, H rows per token, D hidden size, M residual streams, E memory width (H * head_dim), K taps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.sharding import in_use, spec

GATE_FLOOR = 1e-6  # below this the published square root is flat, which bounds its slope at 500


def signed_sqrt(score: jax.Array) -> jax.Array:
    """sign(s) sqrt(max(|s|, 1e-6)), and 0 at s = 0: the demo's gate, absent from eqs. 4 and 6."""
    return jnp.sign(score) * jnp.sqrt(jnp.maximum(jnp.abs(score), GATE_FLOOR))


def copysign_sqrt(score: jax.Array) -> jax.Array:
    """The same with V4.1's sign: 1e-3 at s = 0."""
    return jnp.where(score >= 0, 1.0, -1.0) * jnp.sqrt(jnp.maximum(jnp.abs(score), GATE_FLOOR))


GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "paper": signed_sqrt,
    "deepseek_v41": copysign_sqrt,
    "qwen_ple": signed_sqrt,
}


def _gate_scores(x_BTMD: jax.Array, key_BTMD: jax.Array, gain_MD: jax.Array, eps: float) -> jax.Array:
    """RMSNorm(x) . RMSNorm(key) / sqrt(D) per stream (eq. 6), with the product of the two norms' gains: [B, T, M].

    Three sums over D and no normalised copy of either operand; x and key are read once in each direction.
    """
    return _gate_scores_forward(x_BTMD, key_BTMD, gain_MD, eps)[0]


def _gate_scores_forward(x_BTMD, key_BTMD, gain_MD, eps):
    x, key, gain = _wide(x_BTMD), _wide(key_BTMD), _wide(gain_MD)[None, None]
    width = x.shape[-1]
    x_scale = jax.lax.rsqrt(jnp.mean(x * x, -1) + eps)
    key_scale = jax.lax.rsqrt(jnp.mean(key * key, -1) + eps)
    score = jnp.sum(x * key * gain, -1) * x_scale * key_scale * width**-0.5
    return score, (x_BTMD, key_BTMD, gain_MD, x_scale, key_scale, score)


def _gate_scores_backward(eps, residuals, d_score):
    x_BTMD, key_BTMD, gain_MD, x_scale, key_scale, score = residuals
    x, key, gain = _wide(x_BTMD), _wide(key_BTMD), _wide(gain_MD)[None, None]
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


def _gated_short_conv(
    gate_BTM: jax.Array,
    value_BTD: jax.Array,
    norm_gain_MD: jax.Array,
    conv_KMD: jax.Array,
    segment_ids_BT: jax.Array | None,
    dilation: int,
    eps: float,
    cut: bool = False,
) -> jax.Array:
    """y = u + SiLU(conv(RMSNorm(u))) with u = gate * value (eq. 5), causal and depthwise: [B, T, M, D].

    u of every stream is one value scaled by one number, so RMSNorm(u) = value * s with s = gate / rms(u) per token and
    stream, and a tap reads [B, T, D] and [B, T, M] instead of [B, T, M, D]. Shifted multiply-adds: a grouped
    convolution over M*D channels makes the whole reader 4.4 times slower on CPU. With `segment_ids` no tap crosses a
    document boundary. The backward pass is written out: it keeps the inputs only, where autodiff
    would keep a [B, T, M, D] array per tap. `cut`: see `shift`.
    """
    return _short_conv_forward(gate_BTM, value_BTD, norm_gain_MD, conv_KMD, segment_ids_BT, dilation, eps, cut)[0]


def _short_conv_forward(gate_BTM, value_BTD, norm_gain_MD, conv_KMD, segment_ids_BT, dilation, eps, cut):
    gate, value = _wide(gate_BTM), _wide(value_BTD)
    _, scales_KBTM = _tap_scales(gate, value, segment_ids_BT, len(conv_KMD), dilation, eps, cut)
    mixed_BTMD = _mix(scales_KBTM, value, _wide(conv_KMD) * _wide(norm_gain_MD)[None], dilation, cut)
    y_BTMD = gate[..., None] * value[:, :, None, :] + jax.nn.silu(mixed_BTMD)
    return y_BTMD, (gate_BTM, value_BTD, norm_gain_MD, conv_KMD, segment_ids_BT)


def _tap_scales(gate_BTM, value_BTD, segment_ids_BT, taps, dilation, eps, cut):
    """1 / rms(u), and s as each tap sees it, zero across a document boundary: [B, T, M] and K of them."""
    inverse_rms_BTM = jax.lax.rsqrt(gate_BTM**2 * jnp.mean(value_BTD**2, -1, keepdims=True) + eps)
    scale_BTM, scales_KBTM = gate_BTM * inverse_rms_BTM, []
    for distance in _distances(taps, dilation):
        tap_scale = shift(scale_BTM, distance, cut)
        if segment_ids_BT is not None:
            tap_scale = tap_scale * (shift(segment_ids_BT, distance, cut) == segment_ids_BT)[..., None]
        scales_KBTM.append(tap_scale)
    return inverse_rms_BTM, scales_KBTM


def _mix(scales_KBTM, value_BTD, weight_KMD, dilation, cut):
    """The convolution's output before SiLU: [B, T, M, D]."""
    mixed_BTMD = jnp.zeros((), value_BTD.dtype)
    for scale, weight, distance in zip(scales_KBTM, weight_KMD, _distances(len(weight_KMD), dilation), strict=True):
        mixed_BTMD = (
            mixed_BTMD + (scale[..., None] * weight[None, None]) * shift(value_BTD, distance, cut)[:, :, None, :]
        )
    return mixed_BTMD


def _short_conv_backward(dilation, eps, cut, residuals, d_y_BTMD):
    gate_BTM, value_BTD, norm_gain_MD, conv_KMD, segment_ids_BT = residuals
    gate, value, d_y = _wide(gate_BTM), _wide(value_BTD), _wide(d_y_BTMD)
    norm_gain, conv = _wide(norm_gain_MD), _wide(conv_KMD)
    taps, weight_KMD = len(conv), conv * norm_gain[None]
    inverse_rms, scales = _tap_scales(gate, value, segment_ids_BT, taps, dilation, eps, cut)
    mixed = _mix(scales, value, weight_KMD, dilation, cut)
    sigmoid = jax.nn.sigmoid(mixed)
    d_mixed = d_y * sigmoid * (1 + mixed * (1 - sigmoid))
    d_weight_KMD = jnp.stack(
        [
            jnp.sum(d_mixed * scale[..., None] * shift(value, distance, cut)[:, :, None, :], (0, 1))
            for scale, distance in zip(scales, _distances(taps, dilation), strict=True)
        ]
    )
    # The convolution's transpose once, then one sum for each of its two factors.
    d_normed = jnp.zeros((), value.dtype)
    for weight, distance in zip(weight_KMD, _distances(taps, dilation), strict=True):
        d_tap = d_mixed
        if segment_ids_BT is not None:
            d_tap = d_tap * (shift(segment_ids_BT, distance, cut) == segment_ids_BT)[..., None, None]
        d_normed = d_normed + weight[None, None] * unshift(d_tap, distance, cut)
    scale = gate * inverse_rms
    # One term per stream: XLA:CPU sums over a middle dim 10 times slower.
    d_value = sum(
        gate[:, :, m, None] * d_y[:, :, m] + scale[:, :, m, None] * d_normed[:, :, m] for m in range(gate.shape[2])
    )
    d_gate = jnp.einsum("btmd,btd->btm", d_y, value)
    d_scale = jnp.einsum("btmd,btd->btm", d_normed, value)
    # s = gate (gate^2 q + eps)^(-1/2) with q the mean square of the value.
    d_gate = d_gate + d_scale * eps * inverse_rms**3
    d_mean_square = jnp.sum(-0.5 * d_scale * scale**3, -1, keepdims=True)
    d_value = d_value + d_mean_square * value * (2 / value.shape[-1])
    return (
        d_gate.astype(gate_BTM.dtype),
        d_value.astype(value_BTD.dtype),
        jnp.sum(d_weight_KMD * conv, 0).astype(norm_gain_MD.dtype),
        (d_weight_KMD * norm_gain[None]).astype(conv_KMD.dtype),
        None,
    )


gated_short_conv = jax.custom_vjp(_gated_short_conv, nondiff_argnums=(5, 6, 7))
gated_short_conv.defvjp(_short_conv_forward, _short_conv_backward)


def _distances(taps: int, dilation: int) -> list[int]:
    """How far back each tap looks; the last one is the present."""
    return [(taps - 1 - tap) * dilation for tap in range(taps)]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def shift(x_BT: jax.Array, distance: int, cut: bool = False) -> jax.Array:
    """x moved `distance` positions later along dim 1, zeros moving in.

    `cut`: inside shard_map, x is a piece of sequences that go on along the mesh axis `context`, and what moves in are
    the last positions of the piece to the left.
    """
    if not cut or distance == 0:
        length = x_BT.shape[1]
        return jnp.pad(x_BT[:, : max(length - distance, 0)], _along_seq(x_BT, min(distance, length), 0))
    to_right = [(i, i + 1) for i in range(jax.lax.axis_size("context") - 1)]
    left = jax.lax.ppermute(x_BT[:, -distance:], "context", to_right)  # zeros where nobody sends
    return jnp.concatenate([left, x_BT[:, :-distance]], axis=1)


def unshift(x_BT: jax.Array, distance: int, cut: bool = False) -> jax.Array:
    """The transpose of `shift`: earlier, zeros (or the piece to the right) moving in at the end."""
    if not cut or distance == 0:
        length = x_BT.shape[1]
        return jnp.pad(x_BT[:, distance:], _along_seq(x_BT, 0, min(distance, length)))
    to_left = [(i + 1, i) for i in range(jax.lax.axis_size("context") - 1)]
    right = jax.lax.ppermute(x_BT[:, :distance], "context", to_left)
    return jnp.concatenate([x_BT[:, distance:], right], axis=1)


def _along_seq(x_BT: jax.Array, before: int, after: int) -> list[tuple[int, int]]:
    return [(0, 0), (before, after)] + [(0, 0)] * (x_BT.ndim - 2)


class EngramReader(nnx.Module):
    """One Engram layer of the paper: `y = reader(x_BTMD, rows_BTHd, segment_ids_BT)`, to be added to the streams.

    Zero rows give exactly zero output (without `engram_bias`). The convolution starts at zero, so that the reader
    starts as the gated value alone (paper, section 2.4).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        engram = config.engram
        E, M, D = engram.memory_dim, config.hc_mult, config.hidden_size
        self.config, self.kernel_size, self.has_bias = config, engram.engram_kernel_size, engram.engram_bias
        normal, ones, zeros = jax.nn.initializers.normal, jax.nn.initializers.ones, jax.nn.initializers.zeros
        gain_dims = spec("streams", "norm")
        # M keys, then the one value all streams share.
        self.key_value_emd = nnx.Param(
            normal(config.initializer_range)(
                rngs.params(), (E, M + 1, D), jnp.float32, out_sharding=spec("memory", "streams", "embed")
            )
        )
        if self.has_bias:
            self.key_value_bias_md = nnx.Param(zeros(rngs.params(), (M + 1, D), jnp.float32, out_sharding=gain_dims))
        self.query_norm = nnx.Param(ones(rngs.params(), (M, D), jnp.float32, out_sharding=gain_dims))
        self.key_norm = nnx.Param(ones(rngs.params(), (M, D), jnp.float32, out_sharding=gain_dims))
        if self.kernel_size:
            self.conv_norm = nnx.Param(ones(rngs.params(), (M, D), jnp.float32, out_sharding=gain_dims))
            self.conv_kmd = nnx.Param(
                zeros(rngs.params(), (self.kernel_size, M, D), jnp.float32, out_sharding=spec(None, "streams", "norm"))
            )

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
        return self.convolved(gate_BTM, value_BTD, segments_BT).astype(x_BTMD.dtype), gate_BTM

    def gated_value(self, x_BTMD: jax.Array, rows_BTHd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gates [B, T, M] and the one value of all streams [B, T, D], eqs. 3 to 6."""
        engram, eps, dtype = self.config.engram, self.config.rms_norm_eps, x_BTMD.dtype
        memory_BTE = rows_BTHd.reshape(*rows_BTHd.shape[:2], -1).astype(dtype)
        keys_value_BTMD = jnp.einsum(
            "bte,emd->btmd",
            memory_BTE,
            in_use(self.key_value_emd[...], "memory", "streams", "embed", dtype=dtype),
            out_sharding=spec("batch", "seq", "streams", "act"),
        )
        if self.has_bias:
            keys_value_BTMD = keys_value_BTMD + self.key_value_bias_md[...].astype(dtype)[None, None]
        keys_BTMD, value_BTD = keys_value_BTMD[:, :, :-1], keys_value_BTMD[:, :, -1]
        gain_MD = self.query_norm[...] * self.key_norm[...]
        scores_BTM = gate_scores(x_BTMD, keys_BTMD, gain_MD, eps)
        return jax.nn.sigmoid(GATES[engram.engram_variant](scores_BTM)), value_BTD

    @property
    def reach(self) -> int:
        """How many positions back the convolution looks."""
        return max(self.kernel_size - 1, 0) * self.config.engram.engram_max_ngram_size

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


class RecordingReader(nnx.Module):
    """A reader that keeps the gates of its last call; it takes the place of the reader in a model."""

    def __init__(self, reader: EngramReader):
        self.reader = reader

    def __call__(self, x_BTMD: jax.Array, rows_BTHd: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        update_BTMD, gate_BTM = self.reader.read(x_BTMD, rows_BTHd, segment_ids_BT)
        self.gate_btm = nnx.Intermediate(gate_BTM)
        return update_BTMD
