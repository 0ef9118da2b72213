"""Compiles the whole training step for TPUs that are not there, with tables of 26 GB to a chip.

Started as a program of its own by `compiled_step` (libtpu ends the process on some errors). By hand:

    python tests/training/train_step_aot.py v5p:2x2x2 host
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "memory"))
from tpu_aot import memory, run_apart, topology_mesh

SEQ_LEN, WIDTH = 1024, 64
ROWS_PER_HEAD = 16_800_000
"""16 heads over 8 chips: 33.6 million rows to a chip, 26 GB with Adam's moments."""


def compiled_step(topology: str, placement: str) -> dict[str, Any]:
    """Bytes by memory and the collectives of the step. Raises RuntimeError with the end of the output if it fails."""
    return run_apart(__file__, topology, placement)


def compile_step(topology: str, placement: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from engram_jax.config import (
        AttentionConfig,
        DataConfig,
        EngramConfig,
        MemoryConfig,
        ModelConfig,
        MoEConfig,
        OptimizerConfig,
        RunConfig,
        TrainConfig,
    )
    from engram_jax.data.tokenizer import train_tokenizer
    from engram_jax.runs.parts import assemble
    from engram_jax.sharding import BATCH
    from engram_jax.training.planner import Planner
    from engram_jax.training.step import make_train_step

    mesh = topology_mesh(topology)
    config = RunConfig(
        name="aot",
        model=ModelConfig(
            vocab_size=300,
            hidden_size=256,
            num_hidden_layers=2,
            intermediate_size=512,
            attention=AttentionConfig(
                num_attention_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=128
            ),
            moe=MoEConfig(
                n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, implementation="ragged"
            ),
            engram=EngramConfig(
                engram_layer_ids=(1,), engram_n_heads=8, engram_head_dim=WIDTH, engram_vocab_size=ROWS_PER_HEAD
            ),
            hc_mult=2,
        ),
        data=DataConfig(seq_len=SEQ_LEN, batch_size=mesh.size),
        optimizer=OptimizerConfig(warmup_steps=10),
        memory=MemoryConfig(placement=placement),  # type: ignore[arg-type]
        train=TrainConfig(steps=100, mesh_fsdp=4),
    )
    tokenizer = train_tokenizer([Path(__file__).read_text()] * 3, 300)
    parts = assemble(config, tokenizer.backend, list(mesh.devices.flat))
    with jax.set_mesh(parts.mesh):

        def on_chips(tree: Any) -> Any:
            def described(x: Any) -> jax.ShapeDtypeStruct:
                dims = x.sharding.spec if x.sharding is not None else jax.P()
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(parts.mesh, dims))

            return jax.tree.map(described, tree)

        tokens = jax.ShapeDtypeStruct(
            (mesh.size, SEQ_LEN), jnp.int32, sharding=jax.NamedSharding(parts.mesh, jax.P(BATCH, None))
        )
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), tokens)
        planner = Planner(parts.store)
        plan = on_chips(jax.eval_shape(planner.start, batch))
        state = on_chips(parts.abstract_state())
        tables = {}
        for layer, table in parts.store.abstract_state().tables.items():
            at_rest = parts.store.at_rest(layer)
            if at_rest is None:
                tables[layer] = on_chips(table)
            else:
                tables[layer] = jax.tree.map(
                    lambda x, rest: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rest), table, at_rest
                )
        state = dataclasses.replace(state, memory=dataclasses.replace(state.memory, tables=tables))
        step = make_train_step(parts)
        if placement == "device":
            compiled = step.lower(state, batch, plan).compile()
        else:
            held = on_chips(jax.eval_shape(parts.store.load, state.memory, plan))
            compiled = step.lower(state, batch, plan, held, plan).compile()
    text = compiled.as_text()
    collectives = (
        "ragged-all-to-all",
        "all-to-all",
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "collective-permute",
    )
    return memory(compiled) | {
        "table": parts.store.num_bytes // mesh.size,
        "device_argument": compiled.memory_analysis().argument_size_in_bytes,
        "device_alias": compiled.memory_analysis().alias_size_in_bytes,
        "collectives": {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in collectives},
    }


if __name__ == "__main__":
    print(json.dumps(compile_step(*sys.argv[1:])))
