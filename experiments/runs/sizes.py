"""The ladder: matched triples (dense, MoE, MoE with memory) from a laptop's size to the paper's.

python -m experiments.run --list
python -m experiments.run moe_tiny engram_tiny
"""

from __future__ import annotations

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
    replace,
)
from experiments.runs.registry import register
from experiments.runs.twins import active_width, dense_twin, engram_twin

# --- tiny: two CPU cores, minutes ---


@register
def moe_tiny() -> RunConfig:
    """The MoE baseline on the standard library's own source, at a laptop's size.

    Command:  python -m experiments.run moe_tiny
    Cost:     a few minutes on two CPU cores: 250 steps of 4,096 tokens, 1.2 M active of 7.1 M parameters.
    Expected: a validation loss above engram_tiny's.
    """
    moe = MoEConfig(n_routed_experts=24, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=192)
    model = ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=active_width(moe),
        attention=AttentionConfig(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, kv_lora_rank=64),
        moe=moe,
        hc_mult=2,
        dtype="float32",
    )
    return RunConfig(
        model=model,
        data=DataConfig(corpus="python", seq_len=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, muon_steps=(5, 0)),
        train=TrainConfig(steps=250, eval_every=50),
        checkpoint=CheckpointConfig(every=100),
    )


@register
def dense_tiny() -> RunConfig:
    """What sparsity buys: moe_tiny without idle experts, at its active size.

    Command:  python -m experiments.run dense_tiny
    Cost:     somewhat less than moe_tiny.
    Expected: a validation loss above moe_tiny's.
    """
    return dense_twin(moe_tiny())


@register
def engram_tiny() -> RunConfig:
    """Does memory beat experts at equal FLOPs and equal parameters?

    Command:  python -m experiments.run moe_tiny engram_tiny
    Cost:     about moe_tiny's: a quarter of its idle weights became table rows.
    Expected: a validation loss below moe_tiny's.
    """
    memory = EngramConfig(engram_layer_ids=(1, 2), engram_n_heads=4, engram_head_dim=16)
    return engram_twin(moe_tiny(), memory, n_routed_experts=20)


# --- small: one accelerator, an hour or less ---


@register
def moe_small() -> RunConfig:
    """The MoE baseline on source code of all installed packages, for one accelerator.

    Command:  python -m experiments.run moe_small
    Cost:     8,000 steps of 32,768 tokens (0.26 B), 28 M active of 141 M parameters: 6.5e16 FLOPs.
    Expected: a validation loss above engram_small's.
    """
    moe = MoEConfig(n_routed_experts=32, num_experts_per_tok=4, n_shared_experts=1, moe_intermediate_size=320)
    model = ModelConfig(
        vocab_size=16_384,
        hidden_size=512,
        num_hidden_layers=8,
        intermediate_size=active_width(moe),
        attention=AttentionConfig(
            num_attention_heads=8, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, kv_lora_rank=128
        ),
        moe=moe,
        hc_mult=4,
    )
    return RunConfig(
        model=model,
        data=DataConfig(corpus="python+packages", seq_len=1024, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        train=TrainConfig(steps=8000, eval_every=500),
        checkpoint=CheckpointConfig(every=500),
    )


@register
def dense_small() -> RunConfig:
    """moe_small without idle experts, at its active size.

    Command:  python -m experiments.run dense_small
    Cost:     somewhat less than moe_small.
    Expected: a validation loss above moe_small's.
    """
    return dense_twin(moe_small())


@register
def engram_small() -> RunConfig:
    """Does memory beat experts at equal FLOPs and equal parameters, two orders of magnitude below the paper?

    Command:  python -m experiments.run moe_small engram_small
    Cost:     about moe_small's: a quarter of its idle weights became table rows.
    Expected: a validation loss below moe_small's.
    """
    memory = EngramConfig(engram_layer_ids=(1, 4), engram_n_heads=8, engram_head_dim=32)
    return engram_twin(moe_small(), memory, n_routed_experts=28)


# --- the paper's four models (arXiv 2601.07372, appendix A) ---


def _paper(moe: MoEConfig, engram: EngramConfig) -> RunConfig:
    """Appendix A; where it is silent, the mHC paper's 27B (arXiv 2512.24880, table 5), whose backbone this is."""
    model = ModelConfig(
        vocab_size=129_280,
        hidden_size=2560,
        num_hidden_layers=30,
        intermediate_size=12_288,
        attention=AttentionConfig(num_attention_heads=32, num_key_value_heads=32),
        moe=moe,
        engram=engram,
        hc_mult=4,
        remat="full",
        loss_chunk_len=512,
    )
    return RunConfig(
        model=model,
        # The paper's corpus is not published: point data.corpus at your own.
        data=DataConfig(seq_len=4096, batch_size=1280),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000, weight_decay=0.1, table_lr_multiplier=5.0),
        train=TrainConfig(steps=50_000),
        checkpoint=CheckpointConfig(every=1000),
    )


@register
def dense_4b() -> RunConfig:
    """The paper's Dense-4B: 4.1 B parameters, 3.8 B active, 262 B tokens.

    Command:  python -m experiments.run dense_4b --data.corpus ... --data.tokenizer ...
    Cost:     7.5e21 FLOPs; a pod.
    Expected: loss 2.091 on the Pile (table 1).
    """
    return _paper(MoEConfig(n_routed_experts=0), EngramConfig())


@register
def moe_27b() -> RunConfig:
    """The paper's MoE-27B: 26.7 B parameters, 3.8 B active, 262 B tokens.

    Command:  python -m experiments.run moe_27b --data.corpus ... --data.tokenizer ...
    Cost:     7.5e21 FLOPs; a pod.
    Expected: loss 1.960 on the Pile, 1.634 in validation (table 1).
    """
    return _paper(MoEConfig(n_routed_experts=72), EngramConfig())


@register
def engram_27b() -> RunConfig:
    """The paper's Engram-27B: 17 of moe_27b's 72 experts became 5.8 B parameters of memory.

    Command:  python -m experiments.run engram_27b --data.corpus ... --data.tokenizer ...
    Cost:     7.5e21 FLOPs; a pod.
    Expected: loss 1.950 on the Pile, 1.622 in validation (table 1).
    """
    return _paper(MoEConfig(n_routed_experts=55), EngramConfig(engram_layer_ids=(1, 14)))


@register
def engram_40b() -> RunConfig:
    """The paper's Engram-40B: engram_27b with 18.5 B parameters of memory.

    Command:  python -m experiments.run engram_40b --data.corpus ... --data.tokenizer ...
    Cost:     7.5e21 FLOPs; a pod.
    """
    return replace(engram_27b(), model__engram__engram_vocab_size=7_239_680)


# --- tables larger than the chips ---


@register
def dense_4b_memory_100b() -> RunConfig:
    """The paper's 100 B-parameter table beside Dense-4B, in host memory: there it is served, here it trains.

    Command:  python -m experiments.run dense_4b_memory_100b --data.corpus ... --data.tokenizer ...
    Cost:     210 GB of host memory: 16-bit rows, and one float32 number of optimizer state to a row of 80.
    Expected: fits one host of v5p, whose four chips hold none of it.
    """
    memory = EngramConfig(engram_layer_ids=(1,), engram_vocab_size=78_125_000)
    return replace(
        dense_4b(),
        model__engram=memory,
        memory__placement="host",
        memory__row_dtype="bfloat16",
        optimizer__table_optimizer="rowwise_adagrad",
        data__batch_size=64,
        train__mesh_fsdp=4,
        train__grad_accum=8,
    )


@register
def memory_196b() -> RunConfig:
    """A memory of DeepSeek-V4.1's size (two tables of 384 M rows of 256) beside a small backbone, in host memory.

    Command:  python -m experiments.run memory_196b --data.corpus ... --data.tokenizer ...
    Cost:     2.37 TB over the 16 hosts of v5e-64, in float32 with catch-up Adam's moments.
    Expected: fits, with less than 16 GB on each chip.
    """
    memory = EngramConfig(
        engram_layer_ids=(1, 4),
        engram_variant="deepseek_v41",
        engram_max_ngram_size=4,
        engram_head_dim=256,
        engram_vocab_size=16_000_000,
        engram_kernel_size=0,
    )
    return replace(
        moe_small(),
        model__vocab_size=129_280,
        model__engram=memory,
        model__remat="full",
        model__loss_chunk_len=256,
        memory__placement="host",
        data__batch_size=256,
        train__mesh_fsdp=64,
        train__grad_accum=4,
    )
