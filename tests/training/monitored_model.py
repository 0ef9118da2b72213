"""The smallest model with memory in two layers and two streams, and batches for it."""

import jax
import numpy as np

from engram_jax.config import (
    AttentionConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from engram_jax.sharding import BATCH

B, T, K, M, VOCAB = 8, 16, 8, 2, 300
CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=16,
        attention=AttentionConfig(
            num_attention_heads=1, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=8
        ),
        engram=EngramConfig(
            engram_layer_ids=(0, 1), engram_n_heads=K, engram_head_dim=4, engram_vocab_size=(211, 1009)
        ),
        hc_mult=M,
        hc_sinkhorn_iters=1,
        dtype="float32",
    ),
    data=DataConfig(seq_len=T, batch_size=B),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    train=TrainConfig(steps=100),
)


def make_batch(seed):
    """Two documents a row and padding at its end; few tokens, so that n-grams repeat."""
    rng = np.random.default_rng(seed)
    tokens_BT = (40 + np.minimum(rng.zipf(1.5, (B, T)), 12)).astype(np.int32)
    segment_ids = np.tile(np.repeat(np.array([1, 2, 0], np.int32), (7, 6, 3)), (B, 1))
    positions = np.tile(np.concatenate([np.arange(7), np.arange(6), np.arange(3)]).astype(np.int32), (B, 1))
    targets_BT = np.where(segment_ids > 0, np.roll(tokens_BT, -1, axis=1), -1).astype(np.int32)
    return {"tokens": tokens_BT, "targets": targets_BT, "segment_ids": segment_ids, "positions": positions}


def on_devices(parts, batch):
    return jax.device_put(batch, jax.NamedSharding(parts.mesh, jax.P(BATCH)))
