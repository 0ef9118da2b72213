"""Settings check themselves, survive JSON, and say how they differ."""

import dataclasses

import pytest

from engram_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EngramConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    YarnConfig,
    differences,
    from_dict,
    replace,
    to_dict,
)

ENGRAM = EngramConfig(engram_layer_ids=(1,), engram_vocab_size=(10, 20))
WITHOUT_BRANCHES = EngramConfig(engram_without=("multi_branch",))
STRETCHED = YarnConfig(factor=2.0, original_max_position_embeddings=100)


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda: EngramConfig(engram_layer_ids=(2, 1)), "engram_layer_ids", "(2, 1)"),
        (lambda: EngramConfig(engram_layer_ids=(1, 1)), "engram_layer_ids", "(1, 1)"),
        (lambda: EngramConfig(engram_layer_ids=(-1,)), "engram_layer_ids", "-1"),
        (lambda: EngramConfig(engram_variant="deepseek"), "engram_variant", "'deepseek_v41'"),  # type: ignore[arg-type]
        (lambda: EngramConfig(engram_max_ngram_size=1), "engram_max_ngram_size", "1"),
        (lambda: EngramConfig(engram_n_heads=0), "engram_n_heads", "0"),
        (lambda: EngramConfig(engram_head_dim=-4), "engram_head_dim", "-4"),
        (lambda: EngramConfig(engram_vocab_size=(5, 6, 7)), "engram_vocab_size", "3 entries"),
        (lambda: EngramConfig(engram_vocab_size=1), "engram_vocab_size", "1"),
        (lambda: EngramConfig(engram_kernel_size=-1), "engram_kernel_size", "-1"),
        (lambda: EngramConfig(engram_without=("conv",)), "engram_without", "'multi_branch'"),  # type: ignore[arg-type]
        (lambda: EngramConfig(engram_without=("gate", "gate")), "engram_without", "'gate', 'gate'"),
        (lambda: EngramConfig(engram_without=("gate", "multi_branch")), "engram_without", "'multi_branch'"),
        (
            lambda: EngramConfig(engram_variant="qwen_ple", engram_without=("gate", "wide_hash")),
            "engram_without=('gate', 'wide_hash')",
            "'qwen_ple'",
        ),
        (lambda: ModelConfig(hc_mult=1, engram=WITHOUT_BRANCHES), "engram_without=('multi_branch',)", "hc_mult=1"),
        (lambda: AttentionConfig(kind="mha"), "kind", "'gqa'"),  # type: ignore[arg-type]
        (lambda: AttentionConfig(qk_rope_head_dim=7), "qk_rope_head_dim", "7"),
        (lambda: AttentionConfig(rope_theta=1.0), "rope_theta", "1.0"),
        (lambda: YarnConfig(factor=0.5), "yarn.factor", "0.5"),
        (lambda: YarnConfig(beta_fast=1.0), "yarn.beta_fast", "yarn.beta_slow=1.0"),
        (lambda: YarnConfig(mscale=-1.0), "yarn.mscale", "-1.0"),
        (lambda: YarnConfig(original_max_position_embeddings=0), "yarn.original_max_position_embeddings", "0"),
        (lambda: replace(RunConfig(), model__attention__yarn=STRETCHED), "data.seq_len=256", "yarn.factor=2"),
        (lambda: AttentionConfig("gqa", 4, num_key_value_heads=3), "num_attention_heads", "num_key_value_heads=3"),
        (lambda: AttentionConfig("gqa", 4, num_key_value_heads=0), "num_attention_heads", "num_key_value_heads=0"),
        (lambda: MoEConfig(n_routed_experts=4, num_experts_per_tok=5), "num_experts_per_tok", "n_routed_experts=4"),
        (lambda: MoEConfig(scoring_func="relu"), "scoring_func", "'softmax'"),  # type: ignore[arg-type]
        (lambda: ModelConfig(hidden_size=0), "hidden_size", "0"),
        (lambda: ModelConfig(num_hidden_layers=1, engram=ENGRAM), "engram_layer_ids", "num_hidden_layers=1"),
        (lambda: ModelConfig(vocab_size=2, engram=ENGRAM), "engram_pad_token_id", "vocab_size=2"),
        (lambda: ModelConfig(dtype="fp8"), "dtype", "'bfloat16'"),  # type: ignore[arg-type]
        (lambda: ModelConfig(remat="some"), "remat", "'dots'"),  # type: ignore[arg-type]
        (lambda: DataConfig(seq_len=1), "seq_len", "1"),
        (lambda: DataConfig(batch_size=0), "batch_size", "0"),
        (lambda: DataConfig(holdout_fraction=1.0), "holdout_fraction", "1.0"),
        (lambda: DataConfig(max_documents=-1), "max_documents", "-1"),
        (lambda: DataConfig(worker_count=-1), "worker_count", "-1"),
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate", "0"),
        (lambda: OptimizerConfig(decay_at=(0.5,)), "decay_at", "decay_to"),
        (lambda: OptimizerConfig(decay_at=(0.9, 0.8)), "decay_at", "(0.9, 0.8)"),
        (lambda: OptimizerConfig(adam_b1=0.99), "adam_b1", "sqrt(b2)"),
        (lambda: TrainConfig(steps=0), "steps", "0"),
        (lambda: TrainConfig(grad_accum=0), "grad_accum", "0"),
        (lambda: TrainConfig(log_every=0), "log_every", "0"),
        (lambda: CheckpointConfig(keep=0), "keep", "0"),
        (
            lambda: RunConfig(data=DataConfig(batch_size=6), train=TrainConfig(grad_accum=4)),
            "batch_size",
            "grad_accum=4",
        ),
    ],
)
def test_a_wrong_value_is_named(make, field, value):
    with pytest.raises(ConfigError) as error:
        make()
    assert field in str(error.value) and value in str(error.value) and "\n" not in str(error.value)


def test_fields_are_checked_after_replacing_too():
    with pytest.raises(ConfigError, match="steps=-1"):
        replace(RunConfig(), train__steps=-1)


def test_replace_reaches_into_nested_configs():
    run = replace(RunConfig(), name="x", train__steps=7, model__engram__engram_layer_ids=(1,), model__hidden_size=8)
    assert (run.name, run.train.steps, run.model.hidden_size) == ("x", 7, 8)
    assert run.model.engram.engram_layer_ids == (1,)
    assert run.data == RunConfig().data
    assert dataclasses.replace(run.model, engram=EngramConfig(), hidden_size=256) == ModelConfig()


@pytest.mark.parametrize("model", [ModelConfig(), ModelConfig(engram=ENGRAM, moe=MoEConfig(n_routed_experts=8))])
def test_json_brings_a_config_back(model):
    run = RunConfig(name="there", model=model, optimizer=OptimizerConfig(decay_at=(0.5,), decay_to=(0.1,)))
    assert from_dict(RunConfig, to_dict(run)) == run
    assert differences(run, from_dict(RunConfig, to_dict(run))) == []


def test_a_former_name_of_a_field_is_read():
    assert from_dict(MemoryConfig, {"sight_every": 7}) == MemoryConfig(monitor_every=7)


def test_an_unknown_field_is_named():
    values = to_dict(RunConfig())
    values["train"]["stepps"] = 3
    with pytest.raises(ConfigError, match="TrainConfig has no field stepps"):
        from_dict(RunConfig, values)


def test_differences_are_the_leaves():
    ours = replace(RunConfig(), train__steps=50, model__engram__engram_vocab_size=(3, 5))
    theirs = replace(RunConfig(), train__steps=100, model__engram__engram_vocab_size=7)
    assert differences(ours, theirs) == [
        "model.engram.engram_vocab_size: [3, 5] here, 7 there",
        "train.steps: 50 here, 100 there",
    ]


def test_derived_sizes():
    engram = EngramConfig(engram_max_ngram_size=4, engram_n_heads=3, engram_head_dim=5, engram_vocab_size=11)
    assert engram.vocab_size_per_order == (11, 11, 11) and ENGRAM.vocab_size_per_order == (10, 20)
    assert engram.num_rows_per_token == 9 and engram.memory_dim == 45
    assert ENGRAM.enabled and not EngramConfig().enabled
