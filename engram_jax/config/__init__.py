"""Every setting of a run, as frozen dataclasses that check themselves when they are built.

Field names are the field's own: DeepSeek's and Hugging Face's where they exist (`hidden_size`, `n_routed_experts`,
`engram_n_heads`). A wrong value raises `ConfigError` with the field, the value and the remedy, before any compiling.
"""

from engram_jax.config.model import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, YarnConfig
from engram_jax.config.nested import differences, from_dict, replace, to_dict
from engram_jax.config.run import CheckpointConfig, DataConfig, MemoryConfig, OptimizerConfig, RunConfig, TrainConfig
from engram_jax.errors import ConfigError, nearest, require

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EngramConfig",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "YarnConfig",
    "differences",
    "from_dict",
    "nearest",
    "replace",
    "require",
    "to_dict",
]
