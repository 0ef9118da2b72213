"""The summaries that tests/aot/test_golden.py holds a step to. After a change that was meant:

python tests/aot/golden.py [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from engram_jax.aot.child import compile_apart
from engram_jax.aot.chips import topology
from engram_jax.config import (
    AttentionConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    replace,
)

FOLDER = Path(__file__).parent / "golden"


def small() -> RunConfig:
    """Every part of the model once, in two layers that are scanned; tables far larger than all weights."""
    return RunConfig(
        name="golden",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=256,
            num_hidden_layers=3,
            intermediate_size=256,
            attention=AttentionConfig(
                num_attention_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=128
            ),
            moe=MoEConfig(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=128),
            engram=EngramConfig(
                engram_layer_ids=(1,), engram_n_heads=4, engram_head_dim=64, engram_vocab_size=1_000_000
            ),
            hc_mult=2,
            remat="full",
        ),
        data=DataConfig(seq_len=256, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=10, muon_steps=(1, 0)),
        train=TrainConfig(steps=100),
    )


CASES = {
    "v5e-4-fsdp": ("v5e-4", "train", replace(small(), train__mesh_fsdp=4)),
    "v5p-4-expert": ("v5p-4", "train", replace(small(), train__mesh_fsdp=2, train__mesh_expert=2)),
    "v5p-8-host": ("v5p-8", "train", replace(small(), train__mesh_fsdp=8, memory__placement="host")),
    "v5e-4-decode": ("v5e-4", "decode", replace(small(), train__mesh_fsdp=2, train__mesh_tensor=2)),
    "v5p-8-decode-host": ("v5p-8", "decode", replace(small(), train__mesh_fsdp=8, memory__placement="host")),
}


def summary(name: str) -> dict[str, Any]:
    """What may not grow, of a step on one chip."""
    where, program, config = CASES[name]
    r = compile_apart(config, topology(where), [program])[program]
    sent: Counter[str] = Counter()
    for c in r["collectives"]:
        sent[f"{c['kind']} over {'+'.join(c['axes'])}"] += int(c["sent"])
    return {
        "memory": r["memory"]["groups"],
        "host tables": r["host"]["tables"],
        "flops": r["flops"]["compiled"],
        "hbm": r["bytes"]["hbm"],
        "sent": dict(sorted(sent.items())),
        "largest result": max(c["result_bytes"] for c in r["collectives"]),
        "warnings": r["warnings"],
    }


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        (FOLDER / f"{case}.json").write_text(json.dumps(summary(case), indent=1) + "\n")
        print(FOLDER / f"{case}.json")
