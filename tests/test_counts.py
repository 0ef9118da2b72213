import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax import counts
from engram_jax.config import (
    AttentionConfig,
    EngramConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    replace,
)
from engram_jax.inference.cache import new_cache
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.quantized import FrozenFP8
from engram_jax.memory.row_optimizers import bytes_per_row
from engram_jax.memory.store import MemoryStore
from engram_jax.model import Model, split
from engram_jax.optimizers.groups import make_optimizer
from engram_jax.optimizers.roles import roles
from engram_jax.registries import ROW_OPTIMIZERS
from experiments.runs.registry import RUNS, build

TINY = ModelConfig(
    vocab_size=50,
    hidden_size=8,
    num_hidden_layers=3,
    intermediate_size=20,
    attention=AttentionConfig(
        num_attention_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4, kv_lora_rank=5
    ),
    moe=MoEConfig(
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=6, first_k_dense_replace=1
    ),
    engram=EngramConfig(engram_layer_ids=(1,), engram_n_heads=2, engram_head_dim=3, engram_vocab_size=10),
    hc_mult=2,
)


@pytest.mark.parametrize(
    ("name", "total", "active", "memory", "printed_total"),
    [
        ("dense_4b", 4.133, 3.802, 0.0, 4.1),
        ("moe_27b", 26.717, 3.808, 0.0, 26.7),
        ("engram_27b", 26.725, 3.839, 5.792, 26.7),
        ("engram_40b", 39.467, 3.839, 18.534, 39.5),
    ],
)
def test_the_papers_totals(name, total, active, memory, printed_total):
    """Table 5 of the paper; the finer figures are sums of the same sizes that leave out the norms."""
    counted = counts.parameters(build(name).model)
    norms = counted.groups["norms"]
    assert round((counted.paper_total - norms) / 1e9, 3) == total
    assert round((counted.active - norms) / 1e9, 3) == active
    assert round(counted.paper_total / 1e9, 1) == printed_total
    assert round(counted.active / 1e9, 1) == 3.8
    assert round(counted.memory / 1e9, 3) == memory
    assert counted.total - counted.paper_total == 129_280 * 2560


def test_the_papers_tables():
    assert counts.num_rows(build("engram_27b").model) == {1: 36_199_972, 14: 36_204_260}
    assert counts.num_rows(build("engram_40b").model) == {1: 115_837_464, 14: 115_841_428}
    assert counts.num_rows(build("moe_27b").model) == {}


def test_the_papers_sparsity():
    sparse, rho = counts.sparse_parameters(build("engram_27b").model)
    assert round(rho, 3) == 0.743
    moe_sparse, moe_rho = counts.sparse_parameters(build("moe_27b").model)
    assert (round(moe_sparse / 1e9, 3), moe_rho) == (22.578, 1.0)
    assert sparse == pytest.approx(moe_sparse, rel=2e-3)
    assert math.isnan(counts.sparse_parameters(build("dense_4b").model)[1])


@pytest.mark.parametrize(
    "model",
    [
        *(build(name).model for name in ("dense_tiny", "moe_tiny", "engram_small", "engram_27b")),
        replace(TINY, attention__kind="gqa", attention__num_key_value_heads=1, hc_mult=1, tie_word_embeddings=True),
        replace(TINY, engram__engram_bias=True, engram__engram_kernel_size=0),
    ],
)
def test_leaves_are_those_of_the_model(key, model):
    params = jax.eval_shape(lambda key: split(Model(model, key))[1], key)
    built, counted = Counter(), Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        built[path[-1].key] += leaf.size
    for leaf in counts.leaves(model):
        counted[leaf.name] += leaf.size
    assert counted == built


@pytest.mark.parametrize(
    ("changes", "numbers", "readers"),
    [
        ({}, 5 + 2, (9 + 3) * (2 * 4 + 8 * 2)),  # latent and rope key; gates of two streams in float32, a value
        ({"engram__engram_without": ("multi_branch",)}, 5 + 2, (9 + 3) * (4 + 8 * 2)),
        ({"engram__engram_kernel_size": 0}, 5 + 2, 0),
        ({"attention__kind": "gqa", "attention__num_key_value_heads": 1}, 2 * 5, (9 + 3) * (2 * 4 + 8 * 2)),
        ({"engram": EngramConfig()}, 5 + 2, 0),
    ],
    ids=str,
)
def test_bytes_of_the_decoding_cache_by_hand_and_as_allocated(changes, numbers, readers):
    model, places, spare = replace(TINY, **changes), 40, 3
    ids = 4 * (2 + spare) if model.engram.enabled else 0
    assert counts.cache_bytes(model, places, spare) == 3 * places * numbers * 2 + readers + ids + 4
    cache = jax.eval_shape(lambda: new_cache(model, 1, places, spare))
    assert counts.cache_bytes(model, places, spare) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def test_groups_by_hand():
    expert = 3 * 8 * 6
    assert counts.parameters(TINY).groups == {
        "embedding": 50 * 8,
        "head": 50 * 8,
        "attention": 3 * (8 * 2 * 5 + 8 * (5 + 2) + 5 * 2 * (3 + 4) + 2 * 4 * 8),
        "dense_ffn": 3 * 8 * 20,
        "routed_experts": 2 * 4 * expert,
        "shared_experts": 2 * expert,
        "router": 2 * 8 * 4,
        "hyper_connections": 6 * (16 * (2 + 2 + 4) + 3 + 2 + 2 + 4),
        "norms": 7 * 8 + 3 * 5 + 3 * 2 * 8,
        "engram_projections": 12 * 3 * 8,
        "engram_conv": 4 * 2 * 8,
        "memory": 3 * (11 + 13 + 17 + 19),
    }


def test_active_and_flops_by_hand():
    groups = counts.parameters(TINY).groups
    idle = groups["routed_experts"] // 2
    off = sum(groups[name] for name in ("embedding", "head", "memory"))
    assert counts.parameters(TINY).active == sum(groups.values()) - off - idle
    matrices = sum(groups[n] for n in ("attention", "dense_ffn", "shared_experts", "router", "engram_projections"))
    matrices += groups["routed_experts"] // 2 + 6 * 16 * 8 + groups["head"]
    # queries 1..16 see 8.5 keys on average: scores over 5 dims and sums over 4, two heads, three layers
    attention = 3 * 2 * 8.5 * 3 * 2 * (5 + 4)
    assert counts.flops_per_token(TINY, 16) == pytest.approx(6 * matrices + attention)


def test_options_change_the_right_groups():
    base = counts.parameters(TINY).groups
    tied = counts.parameters(replace(TINY, tie_word_embeddings=True))
    assert tied.groups == base | {"head": 0} and tied.paper_total == tied.total
    assert counts.flops_per_token(replace(TINY, tie_word_embeddings=True), 8) == counts.flops_per_token(TINY, 8)
    one_stream = counts.parameters(replace(TINY, hc_mult=1)).groups
    assert one_stream["hyper_connections"] == 0 and one_stream["engram_projections"] == 12 * 2 * 8
    plain = counts.parameters(replace(TINY, engram__engram_layer_ids=())).groups
    assert {name for name in base if plain[name] != base[name]} == {
        *("norms", "engram_projections", "engram_conv", "memory"),
    }
    gqa = counts.parameters(replace(TINY, attention__kind="gqa", attention__num_key_value_heads=1)).groups
    assert gqa["attention"] == 3 * (8 * 2 * 5 + 8 * 5 + 8 * 5 + 2 * 5 * 8)


@pytest.mark.parametrize("matrix_optimizer", ["muon", "adamw"])
def test_state_bytes_are_what_the_optimizer_allocates(matrix_optimizer):
    config = OptimizerConfig(matrix_optimizer=matrix_optimizer)
    params = {
        str(i): {leaf.name: jax.ShapeDtypeStruct((leaf.copies, *leaf.shape), jnp.float32)}
        for i, leaf in enumerate(counts.leaves(TINY))
    }
    optimizer = make_optimizer(config, optax.constant_schedule(1e-3), params, roles(TINY))
    slots = jax.eval_shape(optimizer.init, params)
    allocated = sum(4 * x.size for x in jax.tree.leaves((params, slots)) if x.ndim)
    stated = counts.state_bytes(TINY, config, MemoryConfig())
    assert sum(stated.values()) - stated["memory"] == allocated
    assert stated["memory"] == 60 * (3 * 4 + (2 * 3 + 1) * 4 + 4)  # rows; two moments and last_step; uses


# bytes beside a row of 3 numbers, by hand: two moments (and the step), one number (and the step), one moment
SLOT_BYTES = {
    "catch_up_adam": 2 * 3 * 4 + 4,
    "dense_adam": 2 * 3 * 4,
    "lazy_adam": 2 * 3 * 4,
    "rowwise_adagrad": 4,
    "rowwise_rmsprop": 4 + 4,
    "sinkhorn": 3 * 4,
    "frozen": 0,
}


@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_table_by_hand_and_as_the_store_allocates(rule, dtype, width):
    optimizer, memory = OptimizerConfig(table_optimizer=rule), MemoryConfig(row_dtype=dtype)
    row = counts.row_bytes(TINY, optimizer, memory)
    assert row == counts.TableBytes(3 * width, SLOT_BYTES[rule], 4)
    assert counts.table_bytes(TINY, optimizer, memory) == {
        1: counts.TableBytes(60 * 3 * width, 60 * SLOT_BYTES[rule], 60 * 4)
    }
    # Heads of 11, 13, 17 and 19 rows in four pieces: 3 + 4 + 5 + 5 rows, padded to a multiple of 8.
    owned = counts.table_bytes(TINY, optimizer, memory, devices=4)[1]
    assert owned == counts.TableBytes(24 * 3 * width, 24 * SLOT_BYTES[rule], 24 * 4)
    rule_of_rows = ROW_OPTIMIZERS[rule].create(optimizer, np.ones(1))
    settings = {"row_dtype": dtype, "shards": 4}
    store = MemoryStore.create(TINY.engram, TokenMap.identity(50), rule_of_rows, **settings)
    assert store.num_bytes == 4 * owned.total


def test_the_papers_tables_in_bytes():
    run = build("engram_27b")
    tables = counts.table_bytes(run.model, run.optimizer, run.memory)
    # 80 numbers in float32, two moments of them, the step of the last update, the count of updates
    assert tables[1] == counts.TableBytes(36_199_972 * 320, 36_199_972 * 644, 36_199_972 * 4)
    assert sum(table.total for table in tables.values()) == 72_404_232 * 968 == 70_087_296_576
    assert counts.table_bytes(build("moe_27b").model, run.optimizer, run.memory) == {}


def test_exchange_by_hand():
    # 2 layers x 16 rows; an id, 80 numbers here and 80 back
    assert counts.exchange_bytes_per_token(build("engram_27b").model) == 2 * 16 * (4 + 320 + 320)
    assert counts.exchange_bytes_per_token(build("moe_27b").model) == 0


@pytest.mark.parametrize("name", RUNS)
def test_describe_prints_the_counts(name):
    run = build(name)
    text = counts.describe(run)
    total = counts.parameters(run.model)
    assert f"{total.total:,}" in text and f"{total.active:,}" in text and f"{total.memory:,}" in text
    assert sum(total.groups.values()) == total.total
    assert f"{run.data.batch_size * run.data.seq_len * run.train.steps:,}" in text
    assert ("bytes per parameter" in text) == run.model.engram.enabled


def test_describe_prints_the_bytes_of_the_memory():
    text = counts.describe(replace(build("engram_27b"), memory__row_dtype="bfloat16"))
    assert "72,404,232  (bfloat16 [80], 808 bytes)" in text
    assert "2 rows + 8.05 catch_up_adam + 0.05 uses = 10.1" in text
    assert "11.58 GB + 46.63 GB + 289.6 MB = 58.5 GB" in text
    assert "1: 58.5 GB, 8: 7.313 GB, 64: 914.1 MB, 512: 114.3 MB" in text
    assert "20.61 kB" in text


# --- docs/memory.md ---

DOC = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
V41 = EngramConfig(
    engram_layer_ids=(1, 14),
    engram_variant="deepseek_v41",
    engram_max_ngram_size=4,
    engram_head_dim=256,
    engram_vocab_size=16_000_000,
)
SHAPES = {
    "engram_tiny": build("engram_tiny").model,
    "engram_small": build("engram_small").model,
    "engram_27b": build("engram_27b").model,
    "engram_40b": build("engram_40b").model,
    "DeepSeek-V4.1's shape": ModelConfig(vocab_size=129_280, num_hidden_layers=15, engram=V41),
}


def scaled(number: float) -> str:
    """Three digits: 70,087,296,576 -> 70.1 GB."""
    power = next(p for p in (4, 3, 2, 1, 0) if number >= 1000**p)
    value = number / 1000**power
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


@pytest.mark.parametrize("name", SHAPES)
def test_the_docs_sizes(name):
    model, rows = SHAPES[name], sum(counts.num_rows(SHAPES[name]).values())
    tables = counts.table_bytes(model, OptimizerConfig(), MemoryConfig()).values()
    on_64 = counts.table_bytes(model, OptimizerConfig(), MemoryConfig(), devices=64).values()
    cells = [
        f"`{name}`" if "_" in name else name,
        f"{rows:,} x {model.engram.engram_head_dim}",
        f"{rows * model.engram.engram_head_dim / 1e6:,.1f} M",
        scaled(sum(table.rows for table in tables)),
        scaled(sum(table.optimizer for table in tables)),
        scaled(sum(table.total for table in tables)),
        scaled(sum(table.total for table in on_64)),
        f"{counts.exchange_bytes_per_token(model):,}",
    ]
    assert f"| {' | '.join(cells)} |\n" in DOC


def test_the_docs_other_ways_to_store_v41():
    rows = sum(counts.num_rows(SHAPES["DeepSeek-V4.1's shape"]).values())
    row = counts.row_bytes(
        SHAPES["DeepSeek-V4.1's shape"], OptimizerConfig(table_optimizer="sinkhorn"), MemoryConfig(row_dtype="bfloat16")
    )
    codes, scales = bytes_per_row(FrozenFP8(), 256, jnp.float8_e4m3fn)
    text = " ".join(DOC.split())
    assert f"{row.total:,} bytes a row, {scaled(rows * row.total)}" in text
    frozen = codes + scales + row.uses
    assert f"{frozen} bytes a row, {scaled(rows * frozen)}" in text


@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
def test_the_docs_bytes_of_the_rules(rule):
    row = counts.row_bytes(build("engram_27b").model, OptimizerConfig(table_optimizer=rule), MemoryConfig())
    line = next(line for line in DOC.splitlines() if line.startswith(f"| `{rule}` |"))
    assert f"| {row.optimizer} | {row.optimizer / 80:.3g} |" in line
