"""The whole model as a function: what it may see, what memory adds, and that no way of computing it changes it.

Legend: B batch, T seq, M residual streams, V vocabulary, H rows per token, d row width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from seeds import rng_of

from engram_jax import counts
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, replace
from engram_jax.layers.cross_entropy import NO_LOSS
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.row_optimizers import DenseAdam
from engram_jax.memory.store import MemoryStore
from engram_jax.model import Model, segments, split

CONFIG = ModelConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=4,
    intermediate_size=24,
    attention=AttentionConfig(
        num_attention_heads=2, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, kv_lora_rank=8
    ),
    moe=MoEConfig(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=8),
    engram=EngramConfig(engram_layer_ids=(0, 2), engram_n_heads=2, engram_head_dim=4, engram_vocab_size=300),
    hc_mult=2,
    dtype="float32",
)
SMALL = replace(CONFIG, num_hidden_layers=2, moe__first_k_dense_replace=0, engram__engram_layer_ids=(0,))
B, T = 2, 24


def make(config, rng):
    """A model of random numbers: at birth some are 0 or 1 and would hide mistakes."""
    structure, params, buffers = split(nnx.eval_shape(lambda: Model(config, jax.random.key(0))))

    def fill(path, x):
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.2, x.shape), x.dtype)

    params = jax.tree.map_with_path(fill, params)
    return structure, params, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.01, x.shape), x.dtype), buffers)


def make_store(config):
    return MemoryStore.create(config.engram, TokenMap.identity(config.vocab_size), DenseAdam(np.ones(1)), init_std=1.0)


class Whole:
    """A random model with its memory, as a compiled function of tokens."""

    def __init__(self, rng, config=CONFIG):
        self.config, self.store = config, make_store(config)
        self.structure, self.params, self.buffers = make(config, rng)
        self.memory = self.store.init(jax.random.key(rng.integers(1 << 30)))
        self.logits, self.rows = jax.jit(self._logits), jax.jit(self._rows)

    def _rows(self, tokens, segment_ids):
        return self.store.fetch(self.memory, self.store.plan(tokens, segment_ids), 0)

    def model(self):
        return nnx.merge(self.structure, self.params, self.buffers)

    def _logits(self, tokens, segment_ids, positions):
        rows = self._rows(tokens, segment_ids)
        hidden_BTD, _ = self.model().hidden(tokens, rows, segment_ids, positions)
        return self.model().logits(hidden_BTD)


@pytest.fixture(scope="module")
def whole(request):
    return Whole(rng_of(request))


def random_tokens(rng, shape=(B, T)):
    return rng.integers(3, CONFIG.vocab_size, shape).astype(np.int32)


def one_document(tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.ones_like(tokens), positions


def test_no_position_sees_a_later_token(whole, rng):
    tokens = random_tokens(rng)
    where = one_document(tokens)
    changed_at, changed = 13, tokens.copy()
    changed[:, changed_at] = 3 + (tokens[:, changed_at] - 3 + 7) % (CONFIG.vocab_size - 3)
    before, after = (np.asarray(whole.logits(x, *where)) for x in (tokens, changed))
    np.testing.assert_allclose(after[:, :changed_at], before[:, :changed_at], rtol=0, atol=1e-5)
    assert (np.abs(after - before)[:, changed_at:].max(axis=-1) > 1e-3).all()


def test_no_position_sees_a_later_row(whole, rng):
    """By gradients, which are exact zeros: of one position's output with respect to every row and embedding."""
    at = 11
    # each token once, so that its embedding is its position's
    tokens = rng.permutation(np.arange(3, 3 + T, dtype=np.int32))[None]
    segment_ids, positions = one_document(tokens)

    def output(rows, embedding_vd):
        params = whole.params | {"embedding_vd": embedding_vd}
        hidden_BTD, _ = nnx.merge(whole.structure, params, whole.buffers).hidden(tokens, rows, segment_ids, positions)
        return jnp.sum(hidden_BTD[0, at] * jnp.arange(16))

    row_grads, embedding_grad = jax.jit(jax.grad(output, argnums=(0, 1)))(
        whole.rows(tokens, segment_ids), whole.params["embedding_vd"]
    )
    for grad_T in (*(g[0].reshape(T, -1) for g in row_grads.values()), embedding_grad[tokens[0]]):
        assert (np.abs(grad_T).max(axis=1)[: at + 1] > 0).all()
        assert (np.abs(grad_T)[at + 1 :] == 0).all()


def test_packed_documents_are_as_alone(whole, rng):
    lengths = [9, 5, 10]
    tokens = random_tokens(rng, (1, T))
    ends = np.cumsum(lengths)
    segment_ids = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    packed = np.asarray(whole.logits(tokens, segment_ids, positions))[0]
    for end, length in zip(ends, lengths, strict=True):
        alone = np.full((1, T), 2, np.int32)
        alone[0, :length] = tokens[0, end - length : end]
        is_real = (np.arange(T) < length).astype(np.int32)[None]
        logits = np.asarray(whole.logits(alone, is_real, np.arange(T, dtype=np.int32)[None] * is_real))
        np.testing.assert_allclose(packed[end - length : end], logits[0, :length], rtol=0, atol=2e-5)


def test_options_let_documents_see_each_other(whole, rng):
    tokens = random_tokens(rng)
    segment_ids = np.repeat(np.array([[1, 2]], np.int32), T // 2, axis=1).repeat(B, axis=0)
    positions = np.tile(np.arange(T // 2, dtype=np.int32), (B, 2))
    changed = tokens.copy()
    changed[:, : T // 2] = random_tokens(rng, (B, T // 2))
    attends = Whole(rng, replace(SMALL, attend_across_documents=True))
    reads = Whole(rng, replace(SMALL, engram__engram_cross_documents=True))
    for model, sees in ((whole, False), (attends, True), (reads, True)):
        before, after = (np.asarray(model.logits(x, segment_ids, positions)) for x in (tokens, changed))
        assert (np.abs(after - before)[:, T // 2 :].max() > 1e-3) == sees


def test_zero_rows_are_no_memory(rng):
    config = replace(SMALL, num_hidden_layers=1)
    model = nnx.merge(*make(config, rng))
    tokens = random_tokens(rng)
    rows = make_rows(config, tokens)

    def hidden(rows):  # not compiled as one, so that both ways run the same programs for the same operations
        return model.hidden(tokens, rows, *one_document(tokens))[0]

    without = np.asarray(hidden(None))
    np.testing.assert_array_equal(hidden(jax.tree.map(jnp.zeros_like, rows)), without)
    assert np.abs(np.asarray(hidden(rows)) - without).max() > 1e-2


def unstacked(config, params):
    """{block index: its parameters}, however the blocks are stacked."""
    return {
        i: jax.tree.map(lambda x, i=i, s=segment: np.asarray(x)[i - s.start], params["blocks"][segment.name])
        for segment in segments(config)
        for i in range(segment.start, segment.stop)
    }


def test_without_memory_it_is_the_moe_model_bit_for_bit(rng):
    engram = replace(SMALL, num_hidden_layers=3, engram__engram_layer_ids=(1,))
    moe = replace(engram, engram=EngramConfig())
    assert (len(segments(engram)), len(segments(moe))) == (2, 1)
    (_, ours, our_buffers), (graphdef, theirs, buffers) = (
        split(jax.jit(lambda c=c: Model(c, jax.random.key(3)))()) for c in (engram, moe)
    )
    shared = [name for name in ours if name not in ("blocks", "engram")]
    assert {"embedding_vd", "head_dv", "final_norm"} <= set(shared)
    for name in shared:
        jax.tree.map(np.testing.assert_array_equal, ours[name], theirs[name])
    jax.tree.map(np.testing.assert_array_equal, unstacked(engram, ours), unstacked(moe, theirs))
    assert set(ours) - set(theirs) == {"engram"}

    tokens = random_tokens(rng)
    zeros = jax.tree.map(jnp.zeros_like, make_rows(engram, tokens))
    engram_hidden = nnx.merge(split_structure(engram), ours, our_buffers).hidden(tokens, zeros)[0]
    moe_hidden = nnx.merge(graphdef, theirs, buffers).hidden(tokens)[0]
    np.testing.assert_array_equal(engram_hidden, moe_hidden)


def make_rows(config, tokens):
    store = make_store(config)
    return jax.jit(lambda memory, ids: store.fetch(memory, store.plan(ids), 0))(store.init(jax.random.key(1)), tokens)


def split_structure(config):
    return split(nnx.eval_shape(lambda: Model(config, jax.random.key(0))))[0]


def test_scanned_blocks_are_blocks_in_turn(whole, rng):
    tokens = random_tokens(rng)
    segment_ids, positions = one_document(tokens)
    rows, model = whole.rows(tokens, segment_ids), whole.model()

    def in_turn():
        x_BTMD = jnp.repeat(whole.params["embedding_vd"][tokens][:, :, None], CONFIG.hc_mult, axis=2)
        for segment in segments(CONFIG):
            for i in range(segment.start, segment.stop):
                if i in CONFIG.engram.engram_layer_ids:
                    x_BTMD = x_BTMD + model.engram[str(i)](x_BTMD, rows[str(i)], segment_ids)
                block = jax.tree.map(lambda x, at=i - segment.start: x[at], model.blocks[segment.name])
                x_BTMD, _ = block(x_BTMD, jnp.asarray(positions), jnp.asarray(segment_ids))
        return model.logits(model.final_norm(x_BTMD.mean(axis=2)))

    np.testing.assert_allclose(whole.logits(tokens, segment_ids, positions), jax.jit(in_turn)(), rtol=0, atol=2e-5)


def loss_and_grads(config, params, buffers, rows, tokens, targets):
    """The mean loss with its gradients with respect to parameters and rows, ready to run, and the traced program."""

    def loss(params, rows):
        model = nnx.merge(split_structure(config), params, buffers)
        hidden_BTD, _ = model.hidden(tokens, rows, *one_document(tokens))
        return jnp.mean(model.token_losses(hidden_BTD, targets))

    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(params, rows)
    return lambda: jax.device_get(traced.lower().compile()(params, rows)), str(traced.jaxpr)


@pytest.fixture(scope="module")
def plain(request):
    """Inputs of `loss_and_grads` at SMALL, and its result without rematerialisation and chunks."""
    rng = rng_of(request)
    _, params, buffers = make(SMALL, rng)
    tokens = random_tokens(rng)
    targets = np.where(rng.random((B, T)) < 0.2, NO_LOSS, random_tokens(rng)).astype(np.int32)
    inputs = (params, buffers, make_rows(SMALL, tokens), tokens, targets)
    run, program = loss_and_grads(SMALL, *inputs)
    return inputs, run(), program


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full"},
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        {"loss_chunk_len": 5},
        pytest.param({"loss_chunk_len": T}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_saving_memory_changes_no_number(plain, changes):
    inputs, (loss, grads), program = plain
    run, saving_program = loss_and_grads(replace(SMALL, **changes), *inputs)
    saving_loss, saving_grads = run()
    np.testing.assert_allclose(saving_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), saving_grads, grads)
    assert "remat" not in program and "checkpoint" not in program
    assert ("remat" in saving_program or "checkpoint" in saving_program) == ("remat" in changes)
    all_logits = f"f32[{B},{T},{SMALL.vocab_size}]"
    assert all_logits in program and (all_logits in saving_program) == (changes != {"loss_chunk_len": 5})


def test_remat_policies_differ(plain):
    """`dots` keeps the matrix products, so its program multiplies less often than `full`'s."""
    inputs, _, _ = plain
    products = {}
    for policy in ("none", "dots", "full"):
        _, program = loss_and_grads(replace(SMALL, remat=policy), *inputs)
        products[policy] = program.count("dot_general")
    assert products["none"] < products["full"]
    assert products["dots"] < products["full"]


def test_loss_is_the_targets_negative_log_probability(whole, rng):
    hidden_BTD = jnp.asarray(rng.normal(size=(B, T, 16)), jnp.float32)
    targets = random_tokens(rng)
    targets[0, :4] = NO_LOSS
    losses = np.asarray(jax.jit(lambda *x: whole.model().token_losses(*x))(hidden_BTD, jnp.asarray(targets)))
    logits = np.asarray(hidden_BTD, np.float64) @ np.asarray(whole.params["head_dv"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.where(
        targets == NO_LOSS, 0, -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    assert (losses[0, :4] == 0).all() and (losses > 0).sum() == B * T - 4


def test_tied_embeddings_are_the_head(rng):
    structure, params, buffers = make(replace(SMALL, tie_word_embeddings=True), rng)
    assert "head_dv" not in params
    hidden_BTD = rng.normal(size=(1, 3, 16)).astype(np.float32)
    expected = hidden_BTD @ params["embedding_vd"].T
    model = nnx.merge(structure, params, buffers)
    np.testing.assert_allclose(model.logits(jnp.asarray(hidden_BTD)), expected, rtol=1e-4, atol=1e-5)


def test_one_stream_is_an_ordinary_residual_network(rng):
    config = replace(CONFIG, hc_mult=1, moe=MoEConfig(), engram=EngramConfig(), num_hidden_layers=2)
    graphdef, params, buffers = make(config, rng)
    model = nnx.merge(graphdef, params, buffers)
    tokens = random_tokens(rng)
    _, positions = one_document(tokens)

    @jax.jit
    def both():
        x_BTD = params["embedding_vd"][tokens]
        for i in range(2):
            block = jax.tree.map(lambda x, i=i: x[i], model.blocks["00-01"])
            x_BTD = x_BTD + block.attn(block.attn_norm(x_BTD), jnp.asarray(positions), None)
            x_BTD = x_BTD + block.ffn(block.ffn_norm(x_BTD))
        return model.hidden(tokens)[0], model.final_norm(x_BTD)

    np.testing.assert_allclose(*both(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engram": EngramConfig()},
        {"moe": MoEConfig()},
        {"hc_mult": 1, "tie_word_embeddings": True},
        {"attention__kind": "gqa", "attention__num_key_value_heads": 1, "engram__engram_bias": True},
        {"moe__n_shared_experts": 0, "moe__first_k_dense_replace": 2, "engram__engram_kernel_size": 0},
        {"engram__engram_without": ("gate",), "engram__engram_bias": True},
        {"engram__engram_without": ("multi_branch", "compression")},
        {
            "engram__engram_variant": "over_encoding",
            "engram__engram_layer_ids": (0,),
            "engram__engram_kernel_size": 0,
        },
    ],
    ids=str,
)
def test_counts_are_the_models(changes):
    """Leaf by leaf name, so that no two mistakes cancel; the tables are in the store and nowhere else."""
    config = replace(CONFIG, **changes)
    _, params, _ = split(nnx.eval_shape(lambda: Model(config, jax.random.key(0))))
    held, stated = {}, {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path[-1].key
        held[name] = held.get(name, 0) + leaf.size
    for leaf in counts.leaves(config):
        if leaf.copies:
            stated[leaf.name] = stated.get(leaf.name, 0) + leaf.size
    assert held == stated
    memory = make_store(config).abstract_state()
    counted = counts.parameters(config)
    assert counted.memory == sum(table.rows.size for table in memory.tables.values())
    assert counted.total == sum(held.values()) + counted.memory
