import math
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest

from engram_jax import counts
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, OptimizerConfig, replace
from engram_jax.model import Model, split
from engram_jax.optimizers.groups import make_optimizer
from experiments.registry import RUNS, build

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
    optimizer = make_optimizer(config, optax.constant_schedule(1e-3), params)
    slots = jax.eval_shape(optimizer.init, params)
    allocated = sum(4 * x.size for x in jax.tree.leaves((params, slots)) if x.ndim)
    stated = counts.state_bytes(TINY, config)
    assert sum(stated.values()) - stated["memory"] == allocated
    assert stated["memory"] == 60 * (3 * 3 + 1) * 4


@pytest.mark.parametrize("name", RUNS)
def test_describe_prints_the_counts(name):
    run = build(name)
    text = counts.describe(run)
    total = counts.parameters(run.model)
    assert f"{total.total:,}" in text and f"{total.active:,}" in text and f"{total.memory:,}" in text
    assert sum(total.groups.values()) == total.total
    assert f"{run.data.batch_size * run.data.seq_len * run.train.steps:,}" in text
