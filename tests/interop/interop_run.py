"""A run that was never trained: random parameters, tables in the middle of a training, two checkpoint shards."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import (
    AttentionConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    to_dict,
)
from engram_jax.data.tokenizer import load_tokenizer
from engram_jax.files import write_json
from engram_jax.runs import run_folder
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.parts import Parts, assemble
from engram_jax.runs.state import TrainState

VOCAB_SIZE = 300
STEP = 7
CONFIG = RunConfig(
    name="small",
    model=ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=3,
        intermediate_size=24,
        attention=AttentionConfig(
            num_attention_heads=2, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, kv_lora_rank=10
        ),
        moe=MoEConfig(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=12),
        engram=EngramConfig(engram_layer_ids=(1, 2), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101),
        hc_mult=2,
        hc_sinkhorn_iters=2,
        dtype="float32",
    ),
    data=DataConfig(seq_len=32, batch_size=2),
    optimizer=OptimizerConfig(warmup_steps=2, muon_steps=(1, 0)),
    train=TrainConfig(steps=20),
)


@dataclass(frozen=True)
class Run:
    folder: Path
    state: TrainState
    parts: Parts

    def tables(self) -> dict[str, np.ndarray]:
        with jax.set_mesh(self.parts.mesh):
            found = self.parts.store.materialize(self.state.memory, self.state.step)
        return {layer: np.asarray(rows) for layer, rows in found.items()}


def randomized(tree, rng):
    """Every float array with other values, on its devices; second moments stay positive."""

    def change(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jax.device_put(np.abs(rng.normal(0.1, 0.3, x.shape)).astype(x.dtype) - 0.05, x.sharding)

    return jax.tree.map(change, tree)


def make_run(folder, config, tokenizer_file, devices=2):
    rng = np.random.default_rng(11)
    config = replace(config, train=replace(config.train, mesh_fsdp=devices))
    tokenizer = load_tokenizer(tokenizer_file)
    parts = assemble(config, tokenizer.backend, jax.devices()[:devices])
    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
        tables = {
            layer: replace(
                table,
                rows=randomized(table.rows, rng),
                slots={
                    name: jax.device_put(rng.integers(0, STEP, x.shape).astype(np.int32), x.sharding)
                    if name == "last_step"
                    else randomized(x, rng)
                    for name, x in table.slots.items()
                },
            )
            for layer, table in state.memory.tables.items()
        }
        used = {layer: jnp.int32(3 + i) for i, layer in enumerate(tables)}
        state = replace(
            state,
            step=jax.device_put(np.int32(STEP), state.step.sharding),
            params=randomized(state.params, rng),
            buffers=randomized(state.buffers, rng),
            memory=replace(state.memory, tables=tables, rows_used=used),
        )
        write_json(folder / "config.json", to_dict(parts.config))
        (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
        meta = {
            "format": run_folder.FORMAT,
            "version": "0",
            "config": to_dict(parts.config),
            "hash_constants": parts.store.constants.to_dict(),
            "tokenizer_sha256": tokenizer.sha256,
            "corpus_sha256": "",
        }
        with Checkpoints(folder / "checkpoints", config.checkpoint, parts) as checkpoints:
            checkpoints.save(STEP, state, meta)
    return Run(folder, state, parts)
