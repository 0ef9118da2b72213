"""The table of names covers every leaf of every kind of model; rotary pairs come out as DeepSeek rotates them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, replace
from engram_jax.interop.names import interleave, split_halves, weights
from engram_jax.layers.rope import rope
from engram_jax.model import Model, split

PLAIN = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    num_hidden_layers=2,
    intermediate_size=5,
    attention=AttentionConfig(
        num_attention_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=7, kv_lora_rank=9
    ),
    hc_mult=1,
)
GQA = AttentionConfig(kind="gqa", num_attention_heads=4, num_key_value_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=4)
MEMORY = EngramConfig(engram_layer_ids=(0, 1), engram_n_heads=2, engram_head_dim=3, engram_vocab_size=5)
MODELS = {
    "dense": PLAIN,
    "tied": replace(PLAIN, tie_word_embeddings=True),
    "gqa": replace(PLAIN, attention=GQA),
    "streams": replace(PLAIN, hc_mult=3),
    "experts": replace(PLAIN, moe=MoEConfig(3, 2, 2, 4, first_k_dense_replace=1)),
    "experts, none shared": replace(PLAIN, moe=MoEConfig(3, 2, 0, 4, first_k_dense_replace=0)),
    "memory": replace(PLAIN, hc_mult=2, engram=MEMORY),
    "memory with biases, no convolution": replace(
        PLAIN, hc_mult=2, engram=replace(MEMORY, engram_bias=True, engram_kernel_size=0)
    ),
    "memory without gates": replace(PLAIN, hc_mult=2, engram=replace(MEMORY, engram_without=("gate",))),
    "over-encoding": replace(
        PLAIN,
        hc_mult=2,
        engram=replace(MEMORY, engram_variant="over_encoding", engram_layer_ids=(0,), engram_kernel_size=0),
    ),
    "memory of one branch": replace(PLAIN, hc_mult=2, engram=replace(MEMORY, engram_without=("multi_branch",))),
}


def random_tree(config):
    def init():
        _, params, buffers = split(Model(config, jax.random.key(0)))
        return params, buffers

    rng = np.random.default_rng(5)
    params, buffers = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), jax.eval_shape(init))

    def joined(a, b):
        return a | {k: joined(a[k], v) if k in a and isinstance(v, dict) else v for k, v in b.items()}

    return joined(params, buffers)


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_goes_out_and_comes_back(name):
    config = MODELS[name]
    tree = random_tree(config)
    back = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), tree)
    names, count = [], 0
    for weight in weights(config):
        array = weight.to_file(tree)
        assert array.shape == weight.shape
        weight.from_file(array, back)
        names.append(weight.name)
        count += array.size
    assert len(set(names)) == len(names)
    assert count == sum(leaf.size for leaf in jax.tree.leaves(tree))  # nothing twice
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_rotary_pairs_are_permuted_there_and_back():
    np.testing.assert_array_equal(interleave(np.arange(6)), [0, 3, 1, 4, 2, 5])
    x = np.random.default_rng(0).normal(size=(2, 3, 8))
    np.testing.assert_array_equal(split_halves(interleave(x)), x)


def rotate_interleaved(x_TNH, theta):
    """DeepSeek's rotation: dims 2i and 2i + 1 are a complex number, turned by position * theta^(-2i/H)."""
    T, N, H = x_TNH.shape
    pairs = x_TNH.astype(np.float64).reshape(T, N, H // 2, 2)
    turn = np.exp(1j * np.outer(np.arange(T), theta ** (-np.arange(0, H, 2) / H)))
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(T, N, H)


def test_exported_latent_attention_scores_as_deepseek_rotates():
    """The scores' rotated part, from the file's matrices by DeepSeek's rule and from ours by layers/rope.py."""
    config, T = PLAIN, 9
    a, tree = config.attention, random_tree(PLAIN)
    file = {weight.name: weight.to_file(tree) for weight in weights(config)}
    x_TD = np.random.default_rng(1).normal(size=(T, config.hidden_size)).astype(np.float32)
    layer = "model.layers.1.self_attn"
    q_TNH = (x_TD @ file[f"{layer}.q_proj.weight"].T).reshape(T, a.num_attention_heads, -1)[..., a.qk_nope_head_dim :]
    k_T1H = (x_TD @ file[f"{layer}.kv_a_proj_with_mqa.weight"].T)[:, None, a.kv_lora_rank :]
    q, k = rotate_interleaved(q_TNH, a.rope_theta), rotate_interleaved(k_T1H, a.rope_theta)
    theirs_NTS = np.einsum("tnh,sh->nts", q, k[:, 0])

    block = tree["blocks"]["00-01"]["attn"]
    ours_q = np.einsum("td,dnh->tnh", x_TD, block["q_dnh"][1])[..., a.qk_nope_head_dim :]
    ours_k = (x_TD @ block["kv_down_dr"][1])[:, None, a.kv_lora_rank :]
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    ours_q, ours_k = (rope(jnp.asarray(x)[None], positions, a)[0] for x in (ours_q, ours_k))
    np.testing.assert_allclose(np.einsum("tnh,sh->nts", ours_q, ours_k[:, 0]), theirs_NTS, atol=1e-5)
    assert not np.allclose(np.einsum("tnh,sh->nts", q_TNH, k_T1H[:, 0]), theirs_NTS, atol=1e-2)


def test_grouped_query_attention_keeps_llamas_halves():
    config = MODELS["gqa"]
    tree = random_tree(config)
    file = {weight.name: weight.to_file(tree) for weight in weights(config)}
    expected = tree["blocks"]["00-01"]["attn"]["k_dgh"][0].reshape(config.hidden_size, -1).T
    np.testing.assert_array_equal(file["model.layers.0.self_attn.k_proj.weight"], expected)
