"""What a model holds and what a step costs, from its config alone: parameters, FLOPs, bytes of state and exchange.

`leaves` lists every weight of the backbone, and everything else is a sum over it, so the groups add up to the total.
The tables are counted apart: their rows are looked up, never multiplied, and stay out of the parameters.

    D hidden, N heads, R latent, F ffn width, E experts, M streams, V vocabulary (suffixes as in the layers)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from engram_jax.config import MemoryConfig, ModelConfig, OptimizerConfig, RunConfig
from engram_jax.optimizers.roles import ROLES

GROUPS = (
    *("embedding", "head", "attention", "dense_ffn", "routed_experts", "shared_experts", "router"),
    *("hyper_connections", "norms", "engram_projections", "engram_conv", "memory"),
)
DEVICE_COUNTS = (1, 8, 64, 512)
"""Mesh sizes for which `describe` divides the tables."""


@dataclass(frozen=True)
class Leaf:
    """One kind of weight: its shape in one block, how many blocks hold it, and the share of it a token uses."""

    group: str
    name: str
    shape: tuple[int, ...]
    copies: int = 1
    used: float = 1.0

    @property
    def size(self) -> int:
        return self.copies * math.prod(self.shape)


def leaves(config: ModelConfig) -> list[Leaf]:
    """Every trained weight of the backbone and the Engram readers; the tables are not among them."""
    return [*_ends(config), *_attention(config), *_ffn(config), *_streams(config), *_readers(config)]


def _ends(config: ModelConfig) -> Iterator[Leaf]:
    V, D = config.vocab_size, config.hidden_size
    yield Leaf("embedding", "embedding_vd", (V, D), used=0)
    if not config.tie_word_embeddings:
        yield Leaf("head", "head_dv", (D, V))
    # final_norm, and attn_norm and ffn_norm of every block
    yield Leaf("norms", "gain", (D,), 2 * config.num_hidden_layers + 1)


def _value_dim(config: ModelConfig) -> int:
    """Width of a value head; queries, keys and values of GQA share one."""
    a = config.attention
    return a.v_head_dim if a.kind == "mla" else a.qk_head_dim


def _attention(config: ModelConfig) -> Iterator[Leaf]:
    a, D, L = config.attention, config.hidden_size, config.num_hidden_layers
    N, H, V = a.num_attention_heads, a.qk_head_dim, _value_dim(config)
    yield Leaf("attention", "q_dnh", (D, N, H), L)
    if a.kind == "mla":
        yield Leaf("attention", "kv_down_dr", (D, a.kv_lora_rank + a.qk_rope_head_dim), L)
        yield Leaf("norms", "gain", (a.kv_lora_rank,), L)
        yield Leaf("attention", "kv_up_rnh", (a.kv_lora_rank, N, a.qk_nope_head_dim + V), L)
    else:
        yield Leaf("attention", "k_dgh", (D, a.num_key_value_heads, H), L)
        yield Leaf("attention", "v_dgh", (D, a.num_key_value_heads, V), L)
    yield Leaf("attention", "o_nhd", (N, V, D), L)


def _gated(group: str, width: int, config: ModelConfig, copies: int) -> Iterator[Leaf]:
    D = config.hidden_size
    for name, shape in (("gate_df", (D, width)), ("up_df", (D, width)), ("down_fd", (width, D))):
        yield Leaf(group, name, shape, copies)


def _ffn(config: ModelConfig) -> Iterator[Leaf]:
    moe, D, L = config.moe, config.hidden_size, config.num_hidden_layers
    num_dense = min(moe.first_k_dense_replace, L) if moe.enabled else L
    yield from _gated("dense_ffn", config.intermediate_size, config, num_dense)
    if num_moe := L - num_dense:
        E, F, used = moe.n_routed_experts, moe.moe_intermediate_size, moe.num_experts_per_tok / moe.n_routed_experts
        yield Leaf("router", "router_de", (D, E), num_moe)
        for name, shape in (("gate_edf", (E, D, F)), ("up_edf", (E, D, F)), ("down_efd", (E, F, D))):
            yield Leaf("routed_experts", name, shape, num_moe, used)
        if moe.n_shared_experts:
            yield from _gated("shared_experts", moe.n_shared_experts * F, config, num_moe)


def _streams(config: ModelConfig) -> Iterator[Leaf]:
    M, C = config.hc_mult, config.hc_mult * config.hidden_size
    if M > 1:
        shapes = {"phi_pre_cm": (C, M), "phi_post_cm": (C, M), "phi_res_cm": (C, M * M), "alpha": (3,)}
        shapes |= {"bias_pre": (M,), "bias_post": (M,), "bias_res": (M, M)}
        for name, shape in shapes.items():
            yield Leaf("hyper_connections", name, shape, 2 * config.num_hidden_layers)


def _port(config: ModelConfig, copies: int) -> Iterator[Leaf]:
    M, C = config.hc_mult, config.hc_mult * config.hidden_size
    shapes = {"phi_pre_cm": (C, M), "phi_post_cm": (C, M), "alpha": (2,), "bias_pre": (M,), "bias_post": (M,)}
    for name, shape in shapes.items():
        yield Leaf("hyper_connections", name, shape, copies)


def _readers(config: ModelConfig) -> Iterator[Leaf]:
    engram, M, D, L = config.engram, config.engram_branches, config.hidden_size, len(config.engram.engram_layer_ids)
    if not L:
        return
    if engram.engram_variant == "over_encoding":
        yield Leaf("engram_projections", "slice_hed", (engram.num_rows_per_token, engram.engram_head_dim, D), L)
        return
    keys = 0 if "gate" in engram.engram_without else M
    yield Leaf("engram_projections", "key_value_emd", (engram.memory_dim, keys + 1, D), L)
    if engram.engram_bias:
        yield Leaf("engram_projections", "key_value_bias_md", (keys + 1, D), L)
    if keys:
        yield Leaf("norms", "query_norm", (M, D), L)
        yield Leaf("norms", "key_norm", (M, D), L)
    if "multi_branch" in engram.engram_without:
        yield from _port(config, L)
    if engram.engram_kernel_size:
        yield Leaf("norms", "conv_norm", (M, D), L)
        yield Leaf("engram_conv", "conv_kmd", (engram.engram_kernel_size, M, D), L)


def head_rows(config: ModelConfig) -> dict[int, tuple[int, ...]]:
    """Logical table rows of every head of each Engram layer: primes."""
    if not config.engram.enabled:
        return {}
    # Here, because they bring jax, which the command line's --help does not wait for.
    from engram_jax.memory.compression import TokenMap
    from engram_jax.memory.hashing import hash_constants

    constants = hash_constants(config.engram, TokenMap.identity(config.vocab_size))  # primes do not depend on the map
    return {layer: constants.head_rows(layer) for layer in constants.layer_ids}


def num_rows(config: ModelConfig) -> dict[int, int]:
    """Logical table rows of each Engram layer."""
    return {layer: sum(rows) for layer, rows in head_rows(config).items()}


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; `groups` sums to `total`."""

    groups: dict[str, int]
    active: int
    """Weights that one token is multiplied with, without the vocabulary matrices (the paper's "w/o token embed")."""

    @property
    def total(self) -> int:
        return sum(self.groups.values())

    @property
    def paper_total(self) -> int:
        """The total as the paper prints it: with one vocabulary matrix (arXiv 2601.07372, table 1)."""
        return self.total - self.groups["head"]

    @property
    def memory(self) -> int:
        return self.groups["memory"]


def backbone_parameters(config: ModelConfig) -> Parameters:
    """Counts of everything but the tables, whose exact size takes a prime search."""
    groups = Counter(dict.fromkeys(GROUPS, 0))
    for leaf in leaves(config):
        groups[leaf.group] += leaf.size
    active = sum(round(leaf.size * leaf.used) for leaf in leaves(config) if leaf.group not in ("embedding", "head"))
    return Parameters(dict(groups), active)


def parameters(config: ModelConfig) -> Parameters:
    backbone = backbone_parameters(config)
    memory = sum(num_rows(config).values()) * config.engram.engram_head_dim
    return Parameters(backbone.groups | {"memory": memory}, backbone.active)


def sparse_parameters(config: ModelConfig) -> tuple[int, float]:
    """P_sparse (parameters a token does not use: idle experts and tables) and rho, the experts' share of it (3.3)."""
    routed = sum(round(leaf.size * (1 - leaf.used)) for leaf in leaves(config) if leaf.group == "routed_experts")
    sparse = routed + parameters(config).memory
    return sparse, routed / sparse if sparse else math.nan


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token: 6 per weight of a matrix product, plus the attention scores and their sums.

    Attention counts what a causal kernel must do in a row of one document: a mean of (seq_len + 1) / 2 keys per query,
    2 FLOPs per key and dim forward and twice that backward. Elementwise work and the optimizer are left out.
    """
    a = config.attention
    matrices = sum(leaf.size * leaf.used for leaf in leaves(config) if ROLES[leaf.name].kind == "matrix")
    logits = config.hidden_size * config.vocab_size
    per_key = a.num_attention_heads * (a.qk_head_dim + _value_dim(config)) * config.num_hidden_layers
    return 6 * (matrices + logits) + 6 * per_key * (seq_len + 1) / 2


@dataclass(frozen=True)
class TableBytes:
    """Bytes of table rows and of what is kept beside them."""

    rows: int
    """What the readers read, in the dtype it is stored in."""
    optimizer: int
    uses: int
    """The int32 count of each row's updates."""

    @property
    def total(self) -> int:
        return self.rows + self.optimizer + self.uses


def row_bytes(config: ModelConfig, optimizer: OptimizerConfig, memory: MemoryConfig) -> TableBytes:
    """Bytes of one row under the configured rule and dtype."""
    import numpy as np

    from engram_jax.memory.row_optimizers import ROW_OPTIMIZERS, bytes_per_row

    rule = ROW_OPTIMIZERS[optimizer.table_optimizer].create(optimizer, np.ones(1))  # rates do not change the shapes
    return TableBytes(*bytes_per_row(rule, config.engram.engram_head_dim, memory.row_dtype), uses=4)


def table_bytes(
    config: ModelConfig, optimizer: OptimizerConfig, memory: MemoryConfig, devices: int = 1
) -> dict[int, TableBytes]:
    """Bytes of each Engram layer's table that one of `devices` devices owns, padding included.

    One device owns the logical rows alone. What a placement adds (copies of hot rows, tiles) is not counted.
    """
    if not config.engram.enabled:
        return {}
    from engram_jax.memory.table import TableLayout

    row = row_bytes(config, optimizer, memory)
    owned = {layer: TableLayout(heads, devices).rows_per_shard for layer, heads in head_rows(config).items()}
    return {layer: TableBytes(n * row.rows, n * row.optimizer, n * row.uses) for layer, n in owned.items()}


def exchange_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token's lookups send through the mesh in a training step, at most.

    Each lookup sends its id (int32) to the owner, the row comes back and its gradient goes there, both in float32. A
    device asks for a row once however often its tokens repeat it, which leaves the share memory/distinct_share of this;
    1/devices of it stays at home. Places that transport all_to_all sends empty are not counted.
    """
    engram = config.engram
    return len(engram.engram_layer_ids) * engram.num_rows_per_token * (4 + 2 * 4 * engram.engram_head_dim)


def state_bytes(config: ModelConfig, optimizer: OptimizerConfig, memory: MemoryConfig) -> dict[str, int]:
    """Bytes of training state by group over all devices: float32 weights and the optimizer's slots beside them.

    Muon keeps a momentum, AdamW two moments; tables as in `table_bytes`, without padding.
    """
    total = Counter(dict.fromkeys(GROUPS, 0))
    for leaf in leaves(config):
        one_slot = ROLES[leaf.name].kind == "matrix" and optimizer.matrix_optimizer == "muon"
        total[leaf.group] += 4 * leaf.size * (2 if one_slot else 3)
    total["memory"] = sum(table.total for table in table_bytes(config, optimizer, memory).values())
    return dict(total)


def describe(run: RunConfig) -> str:
    """A table of the run's counts, for `--print`."""
    model, tokens = run.model, run.data.batch_size * run.data.seq_len * run.train.steps
    counts, state = parameters(model), state_bytes(model, run.optimizer, run.memory)
    sparse, rho = sparse_parameters(model)
    flops = flops_per_token(model, run.data.seq_len)
    lines = [f"{'group':20}{'parameters':>18}{'state':>12}"]
    lines += [f"{group:20}{counts.groups[group]:>18,}{_bytes(state[group]):>12}" for group in GROUPS]
    lines += [f"{'total':20}{counts.total:>18,}{_bytes(sum(state.values())):>12}", ""]
    facts = {
        "total, one vocabulary": f"{counts.paper_total:,}",
        "active": f"{counts.active:,}  (per token, without embedding and head)",
        "memory": f"{counts.memory:,}",
        "sparse": f"{sparse:,}  (idle experts and memory{f'; experts hold {rho:.1%}' if sparse else ''})",
        "FLOPs per token": f"{flops:.4g}  (training)",
        "tokens": f"{tokens:,}",
        "FLOPs": f"{flops * tokens:.4g}",
    }
    if model.engram.enabled:
        facts |= _memory_facts(run)
    return "\n".join(lines + [f"{name:24}{value}" for name, value in facts.items()])


def _memory_facts(run: RunConfig) -> dict[str, str]:
    width, settings = run.model.engram.engram_head_dim, (run.model, run.optimizer, run.memory)
    row, tables = row_bytes(*settings), table_bytes(*settings).values()
    owned = {n: sum(table.total for table in table_bytes(*settings, devices=n).values()) for n in DEVICE_COUNTS}
    return {
        "memory rows": f"{sum(num_rows(run.model).values()):,}  ({run.memory.row_dtype} [{width}], {row.total} bytes)",
        "bytes per parameter": f"{row.rows / width:.4g} rows + {row.optimizer / width:.4g} "
        f"{run.optimizer.table_optimizer} + {row.uses / width:.4g} uses = {row.total / width:.4g}",
        "bytes of memory": f"{_bytes(sum(t.rows for t in tables))} + {_bytes(sum(t.optimizer for t in tables))} + "
        f"{_bytes(sum(t.uses for t in tables))} = {_bytes(sum(t.total for t in tables))}",
        "on each device of": ", ".join(f"{n}: {_bytes(number)}" for n, number in owned.items()),
        "exchange per token": f"{_bytes(exchange_bytes_per_token(run.model))}  (at most: without de-duplication)",
    }


def _bytes(number: float) -> str:
    power = min(int(math.log10(max(number, 1))) // 3, 4)
    return f"{number / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
