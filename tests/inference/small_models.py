"""Small models of every kind of memory and attention, and their logits by running whole sequences anew."""

import dataclasses
from functools import partial

import jax
import numpy as np

from engram_jax.config import (
    AttentionConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    YarnConfig,
    replace,
)
from engram_jax.runs.parts import assemble

VOCAB_SIZE = 300
BATCH, MAX_LEN = 3, 40  # of all tests here: each other shape would be another compilation
PAPER = RunConfig(
    name="small",
    model=ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        attention=AttentionConfig(
            num_attention_heads=4, num_key_value_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            kv_lora_rank=16,
        ),
        moe=MoEConfig(
            n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16,
            first_k_dense_replace=1,
        ),
        engram=EngramConfig(engram_layer_ids=(0, 1), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101),
        hc_mult=2,
        hc_sinkhorn_iters=2,
        dtype="float32",
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
)  # fmt: skip
YARN = YarnConfig(factor=8, original_max_position_embeddings=32, mscale=0.5)
CONFIGS = {
    "paper, mla": PAPER,
    "deepseek_v41, gqa": replace(
        PAPER,
        model__attention__kind="gqa",
        model__attention__yarn=YARN,
        model__engram=dataclasses.replace(
            PAPER.model.engram, engram_variant="deepseek_v41", engram_max_ngram_size=4, engram_kernel_size=0
        ),
        model__hc_mult=1,
        model__moe__n_routed_experts=0,
    ),
    "qwen_ple, mla": replace(
        PAPER,
        model__engram__engram_variant="qwen_ple",
        model__engram__engram_layer_ids=(1,),
        model__attention__yarn=YARN,
        model__hc_mult=1,
    ),
    "no memory": replace(PAPER, model__engram=EngramConfig()),
}
WORDS = ["def", "self", "return", "value", "import", "for", "none", "éß", "漢", "\n", "(", ")", "=", ".", ":"]


def built(config, tokenizer, devices=1):
    """(parts, state); the state is the same on every number of devices."""
    parts = assemble(config, tokenizer.backend, jax.devices()[:devices])
    rng = np.random.default_rng(11)

    def perturbed(x, scale):
        return jax.device_put(np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
        rows = parts.store.init(jax.random.key(5)).tables  # the same logical rows on every mesh
    tables = {name: dataclasses.replace(t, rows=50 * rows[name].rows) for name, t in state.memory.tables.items()}
    params = jax.tree.map(lambda p: perturbed(p, 0.1), state.params)
    return parts, dataclasses.replace(state, params=params, memory=dataclasses.replace(state.memory, tables=tables))


@partial(jax.jit, static_argnums=0)
def _full(parts, state, tokens_BT):
    rows = parts.store.fetch(state.memory, parts.store.plan(tokens_BT), state.step)
    model = parts.model(state.params, state.buffers)
    return model.logits(model.hidden(tokens_BT, rows)[0])


def full_logits(parts, state, tokens_BT) -> np.ndarray:
    """Logits after each token, from one pass over whole sequences: [B, T, V]. Padded behind a causal model's back."""
    padded_BT = np.zeros((max(len(tokens_BT), BATCH), MAX_LEN), np.int32)
    for row, tokens in zip(padded_BT, tokens_BT, strict=False):
        row[: len(tokens)] = tokens
    with jax.set_mesh(parts.mesh):
        return np.asarray(_full(parts, state, padded_BT))
