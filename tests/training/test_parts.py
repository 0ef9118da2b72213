"""What does not fit is refused before any array is made."""

import dataclasses

import jax
import numpy as np
import pytest

from engram_jax.config import ConfigError, EngramConfig, replace
from engram_jax.runs.parts import assemble
from engram_jax.sharding import spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 320}, r"vocab_size=320.*300"),
        ({"model__engram__engram_compressed_vocab_size": 7}, r"engram_compressed_vocab_size=7.*\d+"),
        ({"data__batch_size": 12}, r"data.batch_size=12 .* leaves 12 sequences .* 8 devices"),
        ({"data__batch_size": 16, "train__grad_accum": 4}, r"grad_accum=4 leaves 4 sequences .* 8 devices"),
        ({"train__mesh_fsdp": 8, "model__hidden_size": 28}, r"model.hidden_size=28 .* train.mesh_fsdp=8"),
        ({"train__mesh_fsdp": 3}, r"fsdp=3 does not use all 8 devices"),
        ({"train__mesh_data": 4, "train__mesh_fsdp": 4}, r"data=4 x fsdp=4 does not use all 8 devices"),
        ({"train__mesh_expert": 8}, r"n_routed_experts=4 .* train.mesh_expert=8 leaves 4 places"),
        ({"train__mesh_expert": 2, "model__moe__n_routed_experts": 0}, r"mesh_expert=2, but the model has no experts"),
        ({"train__mesh_tensor": 8}, r"vocab_size=300 .* train.mesh_tensor=8"),
        ({"train__mesh_tensor": 4}, r"num_attention_heads=2 .* train.mesh_tensor=4"),
        ({"train__mesh_context": 8, "data__seq_len": 36}, r"data.seq_len=36 .* train.mesh_context=8"),
        ({"train__mesh_context": 4}, r"mesh_context=4 leaves pieces shorter than the 9 positions"),
        ({"optimizer__warmup_steps": 12}, r"optimizer.warmup_steps=12 .* train.steps=12"),
    ],
)
def test_refused(config, tokenizer, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        assemble(replace(config, **changes), tokenizer)
    assert "\n" not in str(error.value)


def test_the_resolved_config_leaves_nothing_to_find_out(config, tokenizer):
    parts = assemble(config, tokenizer)
    size = parts.config.model.engram.engram_compressed_vocab_size
    assert 0 < size <= 300
    assert replace(parts.config, model__engram__engram_compressed_vocab_size=0) == config
    assert assemble(parts.config, tokenizer).config == parts.config


def test_rows_begin_as_their_setting_says(config, tokenizer):
    assert assemble(config, tokenizer).store.init_std == 0.02
    parts = assemble(replace(config, model__engram__engram_initializer_range=0.0), tokenizer)
    with jax.set_mesh(parts.mesh):
        tables = parts.store.init(jax.random.key(0)).tables
    assert not any(np.any(table.rows) for table in tables.values())
    with pytest.raises(ConfigError, match=r"engram_initializer_range=-0.1 must be 0 or positive"):
        replace(config, model__engram__engram_initializer_range=-0.1)


def test_without_compression_the_raw_vocabulary_is_hashed(config, tokenizer):
    parts = assemble(replace(config, model__engram__engram_without=("compression",)), tokenizer)
    assert parts.config.model.engram.engram_compressed_vocab_size == 300 == parts.store.constants.vocab_size
    assert assemble(config, tokenizer).store.constants.vocab_size < 300


def test_without_memory_there_is_no_table(config, tokenizer):
    parts = assemble(replace(config, model__engram=EngramConfig()), tokenizer)
    with jax.set_mesh(parts.mesh):
        assert parts.abstract_state().memory.tables == {}


def test_the_state_is_sharded_at_birth_as_abstract_state_says(config, tokenizer):
    parts = assemble(replace(config, train__mesh_fsdp=4), tokenizer)
    with jax.set_mesh(parts.mesh):
        state, abstract = parts.init_state(), parts.abstract_state()
        tables = parts.store.abstract_state().tables
        abstract = dataclasses.replace(abstract, memory=dataclasses.replace(abstract.memory, tables=tables))
        stored = spec("layers", "experts", "expert_embed", "ffn")
    described, made = (jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree) for tree in (abstract, state))
    assert described == made
    gate = state.params["blocks"]["00-01"]["ffn"]["gate_edf"]
    assert gate.sharding.spec == stored and "fsdp" in stored[2]
    assert gate.addressable_shards[0].data.size == gate.size // 4
    momentum = jax.tree.leaves_with_path(state.opt_state)
    of_gate = [x for path, x in momentum if path[-1] == jax.tree_util.DictKey("gate_edf")]
    assert of_gate and all(x.sharding == gate.sharding for x in of_gate)


def test_an_exchange_that_the_devices_lack_is_refused(config, tokenizer):
    with pytest.raises(ConfigError, match=r"memory\.transport=ragged_all_to_all.*CPU"):
        assemble(replace(config, memory__transport="ragged_all_to_all"), tokenizer)
