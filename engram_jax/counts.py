"""What a model holds and what a step costs, from its config alone: parameters, FLOPs, bytes of state and exchange.

`leaves` lists every weight of the backbone, and other counts are sums over it, so the groups add up to the total.
The tables are counted apart: their rows are looked up, never multiplied, and are not among the backbone's parameters.

    D hidden, F ffn width, E experts, V vocabulary (suffixes as in the layers)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engram_jax.config import MemoryConfig, ModelConfig, OptimizerConfig, RunConfig
from engram_jax.optimizers.roles import roles
from engram_jax.registries import ATTENTION, READERS
from engram_jax.variants.weights import STREAM_MODULES, WeightSpec, stream_weights

GROUPS = (
    *("embedding", "head", "attention", "dense_ffn", "routed_experts", "shared_experts", "router"),
    *("hyper_connections", "norms", "engram_projections", "engram_conv", "memory"),
)
DEVICE_COUNTS = (1, 8, 64, 512)
"""Mesh sizes for which `describe` divides the tables."""


@dataclass(frozen=True)
class Leaf:
    """One kind of weight."""

    group: str
    """One of `GROUPS`."""
    name: str
    """The last part of the parameter's name."""
    shape: tuple[int, ...]
    """In one block."""
    copies: int = 1
    """How many blocks hold the weight."""
    used: float = 1.0
    """The share of the weight that one token uses."""

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


def _declared(weights: Iterable[WeightSpec], copies: int) -> Iterator[Leaf]:
    return (Leaf(weight.group, weight.leaf, weight.shape, copies) for weight in weights)


def _attention(config: ModelConfig) -> Iterator[Leaf]:
    return _declared(ATTENTION[config.attention.kind].weights(config), config.num_hidden_layers)


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
    if config.hc_mult > 1:
        for module, file in STREAM_MODULES.items():
            yield from _declared(stream_weights(config, module, file), config.num_hidden_layers)


def _readers(config: ModelConfig) -> Iterator[Leaf]:
    engram = config.engram
    if engram.enabled:
        yield from _declared(READERS[engram.engram_variant].weights(config), len(engram.engram_layer_ids))


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
    """Counts without the tables. Their exact size takes a prime search (`parameters`)."""
    groups = Counter(dict.fromkeys(GROUPS, 0))
    for leaf in leaves(config):
        groups[leaf.group] += leaf.size
    active = sum(round(leaf.size * leaf.used) for leaf in leaves(config) if leaf.group not in ("embedding", "head"))
    return Parameters(dict(groups), active)


def parameters(config: ModelConfig) -> Parameters:
    """Counts of the whole model, tables included."""
    backbone = backbone_parameters(config)
    memory = sum(num_rows(config).values()) * config.engram.engram_head_dim
    return Parameters(backbone.groups | {"memory": memory}, backbone.active)


def sparse_parameters(config: ModelConfig) -> tuple[int, float]:
    """P_sparse, the parameters of idle experts and tables, and rho, the experts' share of it (paper, section 3.3)."""
    routed = sum(round(leaf.size * (1 - leaf.used)) for leaf in leaves(config) if leaf.group == "routed_experts")
    sparse = routed + parameters(config).memory
    return sparse, routed / sparse if sparse else math.nan


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token: 6 per weight of a matrix product, plus the attention scores and their sums.

    Attention counts what its variant must do in a row of one document (`AttentionVariant.score_flops`), and twice that
    backward. Elementwise work and the optimizer are left out.
    """
    role = roles(config)
    matrices = sum(leaf.size * leaf.used for leaf in leaves(config) if role[leaf.name].kind == "matrix")
    logits = config.hidden_size * config.vocab_size
    scores = config.num_hidden_layers * ATTENTION[config.attention.kind].score_flops(config, seq_len)
    return 6 * (matrices + logits) + 3 * scores


def cache_bytes(config: ModelConfig, places: int, spare: int = 0) -> int:
    """Bytes that decoding keeps of one sequence (inference/cache.py).

    Args:
      places: tokens that the sequence may have.
      spare: tokens that can be taken back.
    """
    engram = config.engram
    numbers = config.num_hidden_layers * ATTENTION[config.attention.kind].cache_numbers(config, places)
    kept = config.itemsize * numbers + 4  # and the sequence's length, int32
    if engram.enabled:
        kept += 4 * (engram.engram_max_ngram_size - 1 + spare)  # canonical ids, int32
        kept += len(engram.engram_layer_ids) * READERS[engram.engram_variant].cache_bytes(config, spare)
    return kept


@dataclass(frozen=True)
class TableBytes:
    """Bytes of table rows, of their optimizer state and of their counters."""

    rows: int
    """The rows, in the dtype that they are stored in."""
    optimizer: int
    uses: int
    """The int32 count of each row's updates."""

    @property
    def total(self) -> int:
        return self.rows + self.optimizer + self.uses


def row_bytes(config: ModelConfig, optimizer: OptimizerConfig, memory: MemoryConfig) -> TableBytes:
    """Bytes of one row under the configured rule and dtype."""
    import numpy as np

    from engram_jax.memory.row_optimizers import bytes_per_row
    from engram_jax.registries import ROW_OPTIMIZERS

    rule = ROW_OPTIMIZERS[optimizer.table_optimizer].create(optimizer, np.ones(1))  # rates do not change the shapes
    return TableBytes(*bytes_per_row(rule, config.engram.engram_head_dim, memory.row_dtype), uses=4)


def table_bytes(
    config: ModelConfig, optimizer: OptimizerConfig, memory: MemoryConfig, devices: int = 1
) -> dict[int, TableBytes]:
    """Bytes of each Engram layer's table on one of `devices` devices, padding included.

    On one device a table has no padding. Additions of a placement (copies of hot rows, tiles) are not counted.
    """
    if not config.engram.enabled:
        return {}
    from engram_jax.memory.table import TableLayout

    row = row_bytes(config, optimizer, memory)
    owned = {layer: TableLayout(heads, devices).rows_per_shard for layer, heads in head_rows(config).items()}
    return {layer: TableBytes(n * row.rows, n * row.optimizer, n * row.uses) for layer, n in owned.items()}


def exchange_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token's lookups send through the mesh in a training step, at most.

    Each lookup sends its id (int32) to the row's owner. The row comes back and its gradient goes there, in float32.
    A device asks for a row once, however often its tokens repeat it: the share memory/distinct_share of the bytes is
    left, and 1/devices of them does not leave the device. Empty places that transport all_to_all sends are not counted.
    """
    engram = config.engram
    return len(engram.engram_layer_ids) * engram.num_rows_per_token * (4 + 2 * 4 * engram.engram_head_dim)


def state_bytes(config: ModelConfig, optimizer: OptimizerConfig, memory: MemoryConfig) -> dict[str, int]:
    """Bytes of training state by group over all devices: float32 weights and the optimizer's slots beside them.

    Muon keeps a momentum, AdamW two moments; tables as in `table_bytes`, without padding.
    """
    total, role = Counter(dict.fromkeys(GROUPS, 0)), roles(config)
    for leaf in leaves(config):
        one_slot = role[leaf.name].kind == "matrix" and optimizer.matrix_optimizer == "muon"
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
        "decoding cache": f"{_bytes(cache_bytes(model, run.data.seq_len))}  (of {run.data.seq_len:,} tokens)",
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
