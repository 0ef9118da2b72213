"""Two runs as they lie on disk, never trained but with weights and rows large enough for every token to matter."""

import dataclasses

import jax
import numpy as np
import pytest

from engram_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    replace,
)
from engram_jax.data.loader import load_data
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.files import write_json
from engram_jax.runs import run_folder
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.parts import assemble

WORDS = ["def", "self", "return", "value", "import", "for", "none", "éß", "漢", "\n", "(", ")", "=", ".", ":"]
SEQ_LEN = 64


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 60 documents of 10 to 250 words."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(3)
    for i in range(60):
        (folder / f"{i:02d}.py").write_text(f"# {i}\n" + " ".join(rng.choice(WORDS, rng.integers(10, 250))))
    return folder


@pytest.fixture(scope="session")
def config(corpus, tmp_path_factory):
    return RunConfig(
        name="small",
        model=ModelConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            attention=AttentionConfig(
                num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=16
            ),
            engram=EngramConfig(engram_layer_ids=(0, 1), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101),
            hc_mult=1,
            dtype="float32",
        ),
        data=DataConfig(
            corpus=str(corpus),
            cache_dir=str(tmp_path_factory.mktemp("cache")),
            seq_len=SEQ_LEN,
            batch_size=8,
            holdout_fraction=0.2,
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=4),
        checkpoint=CheckpointConfig(every=4),
    )


def save_run(config: RunConfig, run_dir, seed: int) -> None:
    """The folder that training would leave, with random weights."""
    text = load_data(config.data, config.model.vocab_size, silent)
    parts = assemble(config, text.tokenizer.backend, jax.devices()[:1])
    rng = np.random.default_rng(seed)

    def perturbed(x, scale):
        return jax.device_put(np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
        tables = {
            layer: dataclasses.replace(table, rows=perturbed(table.rows, 1.0))
            for layer, table in state.memory.tables.items()
        }
        state = dataclasses.replace(
            state,
            step=state.step + 4,
            params=jax.tree.map(lambda p: perturbed(p, 0.1), state.params),
            memory=dataclasses.replace(state.memory, tables=tables),
        )
        run_dir.mkdir()
        run_folder.describe(run_dir, parts.config, text)
        with Checkpoints(run_dir / "checkpoints", config.checkpoint, parts, silent) as checkpoints:
            checkpoints.save(4, state, run_folder.meta(parts.config, text, parts))
            checkpoints.wait()
    write_json(run_dir / "result.json", {"corpus_sha256": text.corpus_sha256, "loss": 4.0, "bits_per_byte": 2.0})


@pytest.fixture(scope="session")
def run_dir(config, tmp_path_factory):
    """A run with memory in blocks 0 and 1."""
    folder = tmp_path_factory.mktemp("runs") / "with_memory"
    save_run(config, folder, seed=11)
    return folder


@pytest.fixture(scope="session")
def bare_run_dir(config, tmp_path_factory):
    """The same without memory."""
    folder = tmp_path_factory.mktemp("runs") / "without_memory"
    save_run(replace(config, name="bare", model__engram=EngramConfig()), folder, seed=12)
    return folder


@pytest.fixture(scope="package")
def model(run_dir):
    return EvaluatedRun.load(run_dir, batch_tokens=256, log=silent)
