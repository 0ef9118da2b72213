"""A tiny run: a folder of made-up text, a tokenizer of 300 tokens, a two-block MoE model with memory."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from engram_jax.data.tokenizer import train_tokenizer
from engram_jax.runs.state import TrainState
from engram_jax.training.loop import TrainResult, train


@pytest.fixture(scope="session")
def texts():
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdefghijklmnoprstuv"), rng.integers(2, 8))) for _ in range(200)]
    return [" ".join(rng.choice(words, rng.integers(10, 40))) + f" {i}\n" for i in range(300)]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, 300).backend


@pytest.fixture(scope="session")
def config(texts, tmp_path_factory):
    """A complete run of 12 steps over the text, checkpoints every 4."""
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    model = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        attention=AttentionConfig(
            num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16
        ),
        moe=MoEConfig(
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=16,
            first_k_dense_replace=0,
            seq_aux_alpha=0.1,
        ),
        engram=EngramConfig(engram_layer_ids=(0,), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=500),
        hc_mult=1,
        dtype="float32",
    )
    return RunConfig(
        name="engram_tiny",
        model=model,
        data=DataConfig(
            corpus=str(folder),
            cache_dir=str(tmp_path_factory.mktemp("cache")),
            seq_len=32,
            batch_size=8,
            holdout_fraction=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(steps=12, log_every=1, eval_every=5, eval_batches=1, eval_batches_final=2, tensorboard=False),
        checkpoint=CheckpointConfig(every=4),
    )


@pytest.fixture(scope="session")
def make_batch():
    """`make_batch(rng)`: a batch [8, 32] of two documents a row, tokens Zipf-distributed, every target scored."""

    def make(rng):
        ranks = np.minimum(rng.zipf(1.3, (8, 33)), 297)
        tokens = (302 - 2 - ranks).astype(np.int32)
        half = np.repeat(np.array([[1, 2]], np.int32), 16, axis=1)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.repeat(half, 8, axis=0),
            "positions": np.tile(np.arange(16, dtype=np.int32), (8, 2)),
        }

    return make


@pytest.fixture
def abandoned_reads():
    """For tests with damaged files: when one of its concurrent reads fails, Orbax abandons the others, which complain
    to nobody as they end. They are waited for, so that they do so in the test that expects it."""
    yield
    time.sleep(0.5)
    gc.collect()


@dataclass(frozen=True)
class Finished:
    folder: Path
    result: TrainResult
    state: TrainState
    """The final state, on the host."""
    lines: list[str]


@pytest.fixture(scope="package")
def straight(config, tmp_path_factory):
    """The run of `config`, undisturbed, on all devices."""
    folder, lines = tmp_path_factory.mktemp("straight"), []
    result = train(config, folder, lines.append)
    return Finished(folder, result, jax.device_get(result.state), lines)
