"""The language model, a pure function of (params, tokens, rows): embedding -> blocks -> logits, loss.

Blocks of one kind between two Engram layers are stacked (one leading layer dim) and scanned. A block's initialisation
depends on its own index and the seed only, so models that differ in their Engram layers share it bit for bit.

Legend: B batch, T seq, D hidden size, M residual streams, V vocabulary, L layers of a stack.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.layers import cross_entropy
from engram_jax.layers.attention import make_attention
from engram_jax.layers.ffn import FFN
from engram_jax.layers.hyper_connections import HyperConnection, read_streams, write_streams
from engram_jax.layers.moe import Buffer, MoE, MoEStats, updated_bias
from engram_jax.layers.norm import RMSNorm
from engram_jax.layers.reader import reader_class
from engram_jax.sharding import in_use, spec

T = TypeVar("T")

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks of one kind, run as one scan."""

    start: int
    stop: int
    is_moe: bool
    reads_memory: bool
    """An Engram layer stands before the first block."""

    @property
    def name(self) -> str:
        return f"{self.start:02d}-{self.stop - 1:02d}"


def segments(config: ModelConfig) -> list[Segment]:
    """All blocks in order, cut before Engram layers and between dense and MoE blocks."""
    first_moe = config.moe.first_k_dense_replace if config.moe.enabled else config.num_hidden_layers
    cuts = {0, config.num_hidden_layers, min(first_moe, config.num_hidden_layers), *config.engram.engram_layer_ids}
    bounds = sorted(cuts)
    return [
        Segment(start, stop, start >= first_moe, start in config.engram.engram_layer_ids)
        for start, stop in itertools.pairwise(bounds)
    ]


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key for a part of the model. It depends on the name alone, so a new part leaves the other parts unchanged."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class Block(nnx.Module):
    """Attention, then a feed-forward layer, each pre-normed and wrapped in its hyper-connection."""

    def __init__(self, config: ModelConfig, is_moe: bool, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.streams = config.hc_mult
        self.attn_norm, self.ffn_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)
        self.attn = make_attention(config, rngs=rngs)
        if is_moe:
            self.ffn = MoE(config, rngs=rngs)
        else:
            std = config.initializer_range
            out_std = std * (2 * config.num_hidden_layers) ** -0.5
            self.ffn = FFN(D, config.intermediate_size, std, out_std, rngs=rngs)
        if self.streams > 1:
            hc = (D, config.hc_mult, config.hc_sinkhorn_iters, config.hc_gate_init, config.rms_norm_eps)
            self.attn_hc, self.ffn_hc = HyperConnection(*hc, rngs=rngs), HyperConnection(*hc, rngs=rngs)

    def __call__(
        self, x_BTMD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, MoEStats | None]:
        x_BTMD, _ = self.attend(x_BTMD, lambda h_BTD: (self.attn(h_BTD, positions_BT, segment_ids_BT), None))
        return self.feed_forward(x_BTMD, segment_ids_BT)

    def attend(self, x_BTMD: jax.Array, attention: Callable[[jax.Array], tuple[jax.Array, T]]) -> tuple[jax.Array, T]:
        """The first half: the streams after `attention` of normed states [B, T, D], and its second result."""
        with jax.named_scope("attention"):
            hc = self.attn_hc if self.streams > 1 else None
            return self._residual(x_BTMD, hc, lambda h_BTD: attention(self.attn_norm(h_BTD)))

    def feed_forward(
        self, x_BTMD: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, MoEStats | None]:
        """The second half: the streams after the feed-forward layer, and a MoE layer's statistics."""

        def sublayer(h_BTD):
            h_BTD = self.ffn_norm(h_BTD)
            return self.ffn(h_BTD, segment_ids_BT) if isinstance(self.ffn, MoE) else (self.ffn(h_BTD), None)

        with jax.named_scope("ffn"):
            return self._residual(x_BTMD, self.ffn_hc if self.streams > 1 else None, sublayer)

    @staticmethod
    def _residual(x_BTMD: jax.Array, hc: HyperConnection | None, sublayer):
        if hc is None:
            y_BTD, stats = sublayer(x_BTMD[:, :, 0])
            return x_BTMD + y_BTD[:, :, None], stats
        pre_BTM, post_BTM, res_BTMM = hc.coefficients(x_BTMD)
        y_BTD, stats = sublayer(read_streams(x_BTMD, pre_BTM))
        return write_streams(x_BTMD, y_BTD, post_BTM, res_BTMM), stats


class Model(nnx.Module):
    """A language model with or without memory.

    `rows` maps `str(layer_id)` to [batch, seq, heads, head_dim]. Without `rows`, or with rows of zeros, the Engram
    layers add nothing.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        normal = jax.nn.initializers.normal(config.initializer_range)
        self.embedding_vd = nnx.Param(
            normal(named_key(key, "embedding"), (V, D), jnp.float32, out_sharding=spec("vocab", "embed"))
        )
        stacks = {}
        for segment in segments(config):
            layer_keys = jnp.stack([named_key(key, f"block {i}") for i in range(segment.start, segment.stop)])
            stacks[segment.name] = jax.vmap(lambda k, moe=segment.is_moe: Block(config, moe, rngs=nnx.Rngs(k)))(
                layer_keys
            )
        self.blocks = nnx.Dict(stacks)
        self.engram = nnx.Dict(
            {
                str(i): reader_class(config.engram)(config, rngs=nnx.Rngs(named_key(key, f"engram {i}")))
                for i in config.engram.engram_layer_ids
            }
        )
        self.final_norm = RMSNorm(D, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head_dv = nnx.Param(
                normal(named_key(key, "head"), (D, V), jnp.float32, out_sharding=spec("embed", "vocab"))
            )

    def hidden(
        self,
        tokens_BT: jax.Array,
        rows: Mapping[str, jax.Array] | None = None,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, MoEStats]]:
        """Final normed states [B, T, D] in `config.dtype`, and each MoE stack's statistics (leading dim L)."""
        config = self.config
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        attend_ids_BT = None if config.attend_across_documents else segment_ids_BT
        x_BTMD, stats = self.embed(tokens_BT), {}
        for segment in segments(config):
            if segment.reads_memory and rows is not None:
                with jax.named_scope("engram"):
                    layer, own = str(segment.start), rows[str(segment.start)]
                    if (batch := spec("batch", "seq", None, None)) is not None:
                        own = jax.reshard(own, batch)
                    x_BTMD = x_BTMD + self.engram[layer](x_BTMD, own, segment_ids_BT)

            def run_block(x, block):
                return block(x, positions_BT, attend_ids_BT)

            if config.remat != "none":
                run_block = jax.checkpoint(run_block, policy=REMAT_POLICIES[config.remat])
            x_BTMD, stack_stats = jax.lax.scan(run_block, x_BTMD, self.blocks[segment.name])
            if segment.is_moe:
                stats[segment.name] = stack_stats
        return self.final(x_BTMD), stats

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The streams before the first block, all equal to the embedding: x_BTMD."""
        table_VD = in_use(self.embedding_vd[...], "vocab", "embed", dtype=self.config.dtype)
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=spec("batch", "seq", "act"))
        if (share := self.config.engram.vocab_share) != 1:
            x_BTD = share * x_BTD
        return jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], self.config.hc_mult, x_BTD.shape[-1]))

    def final(self, x_BTMD: jax.Array) -> jax.Array:
        """The normed mean of the streams: [B, T, D]."""
        return self.final_norm(jnp.mean(x_BTMD, axis=2))

    @property
    def output_head(self) -> jax.Array:
        """The matrix from states to logits: [D, V]."""
        return self.embedding_vd[...].T if self.config.tie_word_embeddings else self.head_dv[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits [B, T, V]."""
        return cross_entropy.output_logits(hidden_BTD, self.output_head)

    def token_losses(self, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Cross-entropy in nats at each position, 0 where the target is negative (`NO_LOSS`): [B, T].

        With `loss_chunk_len`, logits exist for that many positions at a time and are recomputed in the backward pass.
        """
        chunk = self.config.loss_chunk_len
        if not chunk or chunk >= targets_BT.shape[1]:
            return cross_entropy.token_losses(hidden_BTD, self.output_head, targets_BT)
        mesh = jax.sharding.get_abstract_mesh()
        pieces = 1 if mesh.empty else mesh.shape["context"]  # a chunk has the same positions of every piece
        return cross_entropy.chunked_token_losses(hidden_BTD, self.output_head, targets_BT, -(-chunk // pieces))


def updated_buffers(buffers: dict, stats: Mapping[str, MoEStats], config: ModelConfig) -> dict:
    """The buffers after a step with these expert loads: balancing biases have moved (loss-free balancing)."""
    blocks = dict(buffers.get("blocks", {}))
    for name, stack in stats.items():
        bias_LE = blocks[name]["ffn"]["balance_bias"]
        bias_LE = jax.vmap(updated_bias, in_axes=(0, 0, None))(bias_LE, stack.load_E, config.moe.bias_update_speed)
        blocks[name] = {"ffn": {"balance_bias": bias_LE}}
    return buffers | {"blocks": blocks} if blocks else buffers


def split(model: Model) -> tuple[nnx.GraphDef, dict, dict]:
    """(structure, params, buffers) with params and buffers as plain nested dicts; `nnx.merge` puts them together."""
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
