"""DeepSeekMoE: shared experts for every token, routed experts by top-k, balanced by a bias instead of a large loss.

The routed experts are computed in one of three equal, dropless forms (free functions below). Letters: B batch,
T position, N token, D hidden, E routed expert, F expert width, K experts per token, S row sorted by expert (a slot).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import PartitionSpec as P

from engram_jax.config import ModelConfig, MoEConfig
from engram_jax.layers.expert_parallel import exchanged
from engram_jax.layers.ffn import FFN
from engram_jax.layers.grouped_matmul import grouped_matmul
from engram_jax.sharding import BATCH, LOGICAL_TO_MESH, in_use, platform, spec
from engram_jax.transports import default_transport

STORAGE = LOGICAL_TO_MESH["expert_embed"]
EMBED_DIMS = (1, 1, 2)
"""Of gate_edf, up_edf and down_efd, the dim that is cut in storage only."""


class Buffer(nnx.Variable):
    """State of a layer that is not trained by a gradient."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEStats:
    load_E: jax.Array
    """Share of the routed slots each expert got, over all non-padding tokens of the global batch. Sums to 1."""
    seq_aux: jax.Array
    """DeepSeek-V3's sequence-level balance loss (eq. 17), before its weight; 1 at perfect balance."""
    carried: jax.Array
    """Share of the routed slots that found no room in the first round of the exchange (expert_parallel.py)."""


class Routing(NamedTuple):
    expert_ids_BTK: jax.Array
    weights_BTK: jax.Array
    scores_BTE: jax.Array


def route(x_BTD: jax.Array, router_de: jax.Array, bias_E: jax.Array, config: MoEConfig) -> Routing:
    """Scores every expert and picks the top k by score + bias; the weights are made of the scores alone.

    Arithmetic in float32 or wider: two near-equal scores in bfloat16 would route by rounding.
    """
    x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    router_de = in_use(router_de, "embed", None, dtype=x_BTD.dtype)
    precision, act = jax.lax.Precision.HIGHEST, spec("batch", "seq", "act")
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD, router_de, precision=precision, out_sharding=act)
    scores_BTE = jax.nn.sigmoid(logits_BTE) if config.scoring_func == "sigmoid" else jax.nn.softmax(logits_BTE)
    _, ids_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE) + bias_E[None, None], config.num_experts_per_tok)
    weights_BTK = jnp.take_along_axis(scores_BTE, ids_BTK, axis=-1)
    if config.norm_topk_prob:
        weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20  # all scores may underflow to 0
    return Routing(ids_BTK, weights_BTK * config.routed_scaling_factor, scores_BTE)


def balance_stats(routing: Routing, segment_ids_BT: jax.Array | None, carried: jax.Array | int = 0) -> MoEStats:
    """Load and sequence-level loss of a batch; tokens of segment 0 (padding) do not count."""
    ids_BTK, _, scores_BTE = routing
    K, E = ids_BTK.shape[-1], scores_BTE.shape[-1]
    real_BT = jnp.ones(ids_BTK.shape[:2], bool) if segment_ids_BT is None else segment_ids_BT != 0
    real_BT1 = real_BT[..., None].astype(scores_BTE.dtype)

    chosen_BTE = jnp.sum(jax.nn.one_hot(ids_BTK, E, dtype=jnp.float32), axis=2)
    count_E = jnp.sum(chosen_BTE * real_BT1.astype(jnp.float32), axis=(0, 1))
    load_E = count_E / jnp.maximum(jnp.sum(count_E), 1)

    # V3 counts the top k of the scores here, without the bias: the loss is about the router, not about the correction.
    _, top_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), K)
    length_B1 = jnp.maximum(jnp.sum(real_BT1, axis=1), 1)
    top_BTE = jnp.sum(jax.nn.one_hot(top_BTK, E, dtype=scores_BTE.dtype), axis=2)
    frequency_BE = jnp.sum(top_BTE * real_BT1, axis=1) * (E / K) / length_B1
    share_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    probability_BE = jnp.sum(share_BTE * real_BT1, axis=1) / length_B1
    num_sequences = jnp.maximum(jnp.sum(jnp.any(real_BT, axis=1)), 1)
    return MoEStats(load_E, jnp.sum(frequency_BE * probability_BE) / num_sequences, jnp.float32(carried) / ids_BTK.size)


def updated_bias(bias_E: jax.Array, load_E: jax.Array, speed: float) -> jax.Array:
    """The selection bias after a step: up by `speed` for experts below the mean load, down above it (Wang 2024a)."""
    return bias_E + speed * jnp.sign(jnp.mean(load_E) - load_E)


# ---- the routed experts, three equal forms: (x_ND, expert_ids_NK, weights_NK, gate_edf, up_edf, down_efd) -> y_ND ----


def every_expert(x_ND, expert_ids_NK, weights_NK, gate_edf, up_edf, down_efd):
    """Reference: all experts on all tokens, E/K times the work."""
    wide, one_hot = jnp.promote_types(x_ND.dtype, jnp.float32), jax.nn.one_hot(expert_ids_NK, gate_edf.shape[0])
    weights_EN = jnp.einsum("nk,nke->en", weights_NK, one_hot.astype(weights_NK.dtype))
    gate_edf, up_edf, down_efd = (w.astype(x_ND.dtype) for w in (gate_edf, up_edf, down_efd))
    gate_ENF = jnp.einsum("nd,edf->enf", x_ND, gate_edf, preferred_element_type=wide)
    up_ENF = jnp.einsum("nd,edf->enf", x_ND, up_edf, preferred_element_type=wide)
    hidden_ENF = (jax.nn.silu(gate_ENF) * up_ENF * weights_EN[..., None]).astype(x_ND.dtype)
    return jnp.einsum("enf,efd->nd", hidden_ENF, down_efd, preferred_element_type=wide).astype(x_ND.dtype)


def ragged(x_ND, expert_ids_NK, weights_NK, gate_edf, up_edf, down_efd):
    """Rows sorted by expert, one grouped matmul for each of the three weights (on CPU 10 times too slow)."""
    slots = sort_by_expert(expert_ids_NK, gate_edf.shape[0], block=1)
    gate_edf, up_edf, down_efd = (w.astype(x_ND.dtype) for w in (gate_edf, up_edf, down_efd))
    x_SD, weights_S = gather_rows(x_ND, slots.token_S, slots.slot_NK), _to_slots(weights_NK, slots)
    gate_SF, up_SF = (grouped_matmul(x_SD, w, slots.count_E) for w in (gate_edf, up_edf))
    hidden_SF = (jax.nn.silu(gate_SF) * up_SF * weights_S[:, None]).astype(x_ND.dtype)
    y_SD = grouped_matmul(hidden_SF, down_efd, slots.count_E)
    return sum_rows(y_SD, slots.token_S, slots.slot_NK).astype(x_ND.dtype)


def blocked(x_ND, expert_ids_NK, weights_NK, gate_edf, up_edf, down_efd):
    """Rows sorted by expert and padded to whole blocks of one expert each, a scan of plain matrix products over them.

    The number of blocks is static and enough for any routing. Fast on CPU: forward and backward of 4,096 tokens take
    1.7 times as long as a dense layer of the same active width.
    """
    (N, K), E, D = expert_ids_NK.shape, gate_edf.shape[0], x_ND.shape[1]
    # E blocks are added for the experts' last, partly filled ones: at most 1/8 more rows, down to blocks of 8.
    # Decoding has fewer rows than experts: blocks of one row, and no block for an expert that no token chose.
    block = 1 if N * K <= E else min(max(N * K // (8 * E), 8), 128)
    slots = sort_by_expert(expert_ids_NK, E, block)
    x_SD, weights_S = gather_rows(x_ND, slots.token_S, slots.slot_NK), _to_slots(weights_NK, slots)
    blocks = x_SD.reshape(-1, block, D), weights_S.reshape(-1, block, 1)
    y_SD = _block_experts(*blocks, slots.expert_of_block, gate_edf, up_edf, down_efd).reshape(-1, D)
    return sum_rows(y_SD, slots.token_S, slots.slot_NK).astype(x_ND.dtype)


def stored_specs(num_experts: int) -> tuple[P | None, P | None]:
    """Logical dims of gate_edf and up_edf, and of down_efd.

    If the experts divide over the mesh axis `expert`, each owner stores whole experts. Otherwise that axis too cuts the
    dims that are cut in storage only, and owners receive their experts when they gather them (`owned`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = mesh.empty or num_experts % mesh.shape["expert"] == 0
    experts, embed = ("experts", "expert_embed") if divides else (None, "embed")
    return spec(experts, embed, "ffn"), spec(experts, "ffn", embed)


def owned(experts: tuple[jax.Array, ...], num_experts: int) -> tuple[jax.Array, ...]:
    """This device's experts, whole, from its part of the stored weights, inside shard_map.

    The last owner may have fewer experts, and zeros in place of the missing ones. The gradient is sent back by a
    reduce-scatter.
    """
    if missing := -num_experts % jax.lax.axis_size("expert"):
        experts = tuple(
            jax.lax.all_to_all(
                jnp.pad(w, [(0, missing), (0, 0), (0, 0)]), "expert", split_axis=0, concat_axis=dim, tiled=True
            )
            for w, dim in zip(experts, EMBED_DIMS, strict=True)
        )
    return tuple(
        jax.lax.all_gather(w, STORAGE, axis=dim, tiled=True) for w, dim in zip(experts, EMBED_DIMS, strict=True)
    )


FORMS = {"every_expert": every_expert, "ragged": ragged, "blocked": blocked}


class Slots(NamedTuple):
    """Places of the N * K routed rows, sorted by expert, each expert's rows padded to whole blocks."""

    token_S: jax.Array
    """The token in a slot; 0 in an empty slot, whose routing weight is 0."""
    slot_NK: jax.Array
    count_E: jax.Array
    """Rows per expert, without padding."""
    expert_of_block: jax.Array
    """[S / block]."""


def sort_by_expert(expert_ids_NK: jax.Array, num_experts: int, block: int) -> Slots:
    """A stable sort; S = N * K rounded up to blocks, plus a block per expert (block = 1: exactly N * K slots).

    Id E means no expert: its rows come last and belong to no expert.
    """
    (N, K), E = expert_ids_NK.shape, num_experts
    num_blocks = N * K if block == 1 else -(-N * K // block) + E
    expert_ids = expert_ids_NK.reshape(-1)
    count_E = jnp.zeros(E, jnp.int32).at[expert_ids].add(1, mode="drop")
    padded_E = -(-count_E // block) * block
    end_E = jnp.cumsum(padded_E)
    shift_E = (end_E - padded_E) - (jnp.cumsum(count_E) - count_E)
    order = jnp.argsort(expert_ids, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(N * K, dtype=order.dtype), unique_indices=True)
    slot = rank + shift_E[jnp.minimum(expert_ids, E - 1)]
    token_S = jnp.zeros(num_blocks * block, jnp.int32)
    token_S = token_S.at[slot].set(jnp.arange(N * K, dtype=jnp.int32) // K, unique_indices=True)
    expert_of_block = jnp.searchsorted(end_E, jnp.arange(num_blocks) * block, side="right").clip(max=E - 1)
    return Slots(token_S, slot.reshape(N, K), count_E, expert_of_block)


def _to_slots(weights_NK: jax.Array, slots: Slots) -> jax.Array:
    return jnp.zeros(slots.token_S.shape, weights_NK.dtype).at[slots.slot_NK].set(weights_NK, unique_indices=True)


# Each of the two is the other's gradient, so neither direction scatters. Empty slots need no mask: their routing
# weight is 0, which zeroes what they compute and every gradient they send to an expert.


@jax.custom_vjp
def gather_rows(x_ND: jax.Array, token_S: jax.Array, slot_NK: jax.Array) -> jax.Array:
    """x_SD: every slot's token row."""
    return x_ND.at[token_S].get(mode="promise_in_bounds")


@jax.custom_vjp
def sum_rows(x_SD: jax.Array, token_S: jax.Array, slot_NK: jax.Array) -> jax.Array:
    """y_ND: every token's K slot rows, summed in float32 or wider, in `x.dtype`."""
    wide = jnp.promote_types(x_SD.dtype, jnp.float32)
    rows = (x_SD.at[slot_NK[:, k]].get(mode="promise_in_bounds").astype(wide) for k in range(slot_NK.shape[1]))
    return sum(rows, start=jnp.zeros((), wide)).astype(x_SD.dtype)


gather_rows.defvjp(
    lambda x, *where: (gather_rows(x, *where), where), lambda where, g: (sum_rows(g, *where), None, None)
)
sum_rows.defvjp(lambda x, *where: (sum_rows(x, *where), where), lambda where, g: (gather_rows(g, *where), None, None))


def _expert(x_SD, weight_S1, gate_df, up_df, down_fd):
    wide = jnp.promote_types(x_SD.dtype, jnp.float32)
    gate_SF = jnp.matmul(x_SD, gate_df.astype(x_SD.dtype), preferred_element_type=wide)
    up_SF = jnp.matmul(x_SD, up_df.astype(x_SD.dtype), preferred_element_type=wide)
    hidden_SF = (jax.nn.silu(gate_SF) * up_SF * weight_S1).astype(x_SD.dtype)
    return jnp.matmul(hidden_SF, down_fd.astype(x_SD.dtype), preferred_element_type=wide)


@jax.custom_vjp
def _block_experts(x_blocks, weight_blocks, expert_of_block, gate_edf, up_edf, down_efd):
    def one_block(_, block):
        x, weight, e = block
        return None, _expert(x, weight, gate_edf[e], up_edf[e], down_efd[e])

    return jax.lax.scan(one_block, None, (x_blocks, weight_blocks, expert_of_block))[1]


def _block_experts_forward(*args):
    return _block_experts(*args), args


def _block_experts_backward(args, dy_blocks):
    # Autodiff of the scan would add a whole [E, D, F] gradient per block; this adds each block's in place, and
    # recomputes the hidden layer instead of keeping it (2 times faster at 4,096 tokens).
    x_blocks, weight_blocks, expert_of_block, *experts = args

    def one_block(d_experts, block):
        x, weight, e, dy = block
        dx, dweight, *d_expert = jax.vjp(_expert, x, weight, *(w[e] for w in experts))[1](dy)
        return [d.at[e].add(g) for d, g in zip(d_experts, d_expert, strict=True)], (dx, dweight)

    zeros = [jnp.zeros_like(w) for w in experts]
    d_experts, (dx, dweight) = jax.lax.scan(one_block, zeros, (x_blocks, weight_blocks, expert_of_block, dy_blocks))
    return dx, dweight, None, *d_experts


_block_experts.defvjp(_block_experts_forward, _block_experts_backward)


class MoE(nnx.Module):
    """A feed-forward layer of experts. The trainer moves `balance_bias` (`updated_bias`), no gradient does."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe, D, E, F = config.moe, config.hidden_size, config.moe.n_routed_experts, config.moe.moe_intermediate_size
        std, out_std = config.initializer_range, config.initializer_range * (2 * config.num_hidden_layers) ** -0.5
        into, out = stored_specs(E)
        self.router_de = nnx.Param(normal(std)(rngs.params(), (D, E), jnp.float32, out_sharding=spec("embed", None)))
        self.gate_edf = nnx.Param(normal(std)(rngs.params(), (E, D, F), jnp.float32, out_sharding=into))
        self.up_edf = nnx.Param(normal(std)(rngs.params(), (E, D, F), jnp.float32, out_sharding=into))
        self.down_efd = nnx.Param(normal(out_std)(rngs.params(), (E, F, D), jnp.float32, out_sharding=out))
        self.balance_bias = Buffer(jnp.zeros((E,), jnp.float32, out_sharding=spec("norm")))
        self.shared = FFN(D, moe.n_shared_experts * F, std, out_std, rngs=rngs) if moe.n_shared_experts else None
        self.config = moe

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None = None) -> tuple[jax.Array, MoEStats]:
        """x_BTD -> (y_BTD, MoEStats)."""
        routing = route(x_BTD, self.router_de[...], self.balance_bias[...], self.config)
        y_BTD, carried = self._routed(x_BTD, routing)
        if self.shared is not None:
            y_BTD += self.shared(x_BTD)
        return y_BTD, balance_stats(routing, segment_ids_BT, carried)

    def _routed(self, x_BTD: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        name = self.config.implementation
        if name == "auto":
            name = "blocked" if platform() == "cpu" else "ragged"
        form, factor = FORMS[name], self.config.capacity_factor
        mesh = jax.sharding.get_abstract_mesh()
        kind = "" if mesh.empty else mesh.abstract_device.device_kind
        transport, axes = default_transport(kind, mesh.size), mesh.axis_names

        def local(x_BTD, ids_BTK, weights_BTK, *experts):
            x_ND, ids_NK, weights_NK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTK, weights_BTK))
            if mesh.empty:
                return form(x_ND, ids_NK, weights_NK, *experts).reshape(x_BTD.shape), jnp.zeros((), jnp.int32)
            experts = owned(tuple(w.astype(x_ND.dtype) for w in experts), self.config.n_routed_experts)
            if mesh.shape["expert"] == 1:
                y_ND, carried = form(x_ND, ids_NK, weights_NK, *experts), jnp.zeros((), jnp.int32)
            else:
                y_ND, carried = exchanged(x_ND, ids_NK, weights_NK, experts, form, factor, transport, axes)
            if mesh.shape["tensor"] > 1:  # each device had a part of every expert's width
                y_ND = jax.lax.psum(y_ND.astype(jnp.promote_types(y_ND.dtype, jnp.float32)), "tensor")
            return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), jax.lax.psum(carried, (*BATCH, "context"))

        arrays = x_BTD, routing.expert_ids_BTK, routing.weights_BTK
        if not mesh.empty:
            act = spec("batch", "seq", "act")
            arrays = tuple(jax.reshard(a, act) for a in arrays)
            into, out = stored_specs(self.config.n_routed_experts)
            # Every device sorts its own tokens. check_vma=False: the hand-written gradients know no mesh axes;
            # shard_map sums the experts' gradients over the axes along which they are copies all the same.
            specs = (act, act, act, into, into, out)
            local = jax.shard_map(local, in_specs=specs, out_specs=(act, P()), check_vma=False)
        return local(*arrays, self.gate_edf[...], self.up_edf[...], self.down_efd[...])
