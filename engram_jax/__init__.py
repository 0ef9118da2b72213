"""engram_jax: conditional memory (DeepSeek's Engram, arXiv 2601.07372) beside Mixture-of-Experts, in JAX and Flax.

The names below are the package's public face. Each is imported when it is first used, so that `import engram_jax` and
`engram-jax --help` take no time. Other modules may move between versions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engram_jax.version import __version__

if TYPE_CHECKING:
    from engram_jax import registries
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
        replace,
    )
    from engram_jax.errors import RunError
    from engram_jax.evaluation.evaluate import evaluate
    from engram_jax.evaluation.evaluated_run import EvaluatedRun
    from engram_jax.inference.engine import Engine
    from engram_jax.inference.sampling import Sampling
    from engram_jax.interop.runs import export_run, import_run
    from engram_jax.layers.engram import EngramReader
    from engram_jax.memory.compression import TokenMap
    from engram_jax.memory.dense_table import DenseTable
    from engram_jax.memory.frozen import freeze
    from engram_jax.memory.hashing import canonicalize, hash_constants, ngram_row_ids
    from engram_jax.memory.row_optimizers import CatchUpAdam
    from engram_jax.memory.store import MemoryStore
    from engram_jax.model import Model
    from engram_jax.plugin import Engram
    from engram_jax.runs.load import load_run
    from engram_jax.training.loop import train

__all__ = [
    "AttentionConfig",
    "CatchUpAdam",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DenseTable",
    "Engine",
    "Engram",
    "EngramConfig",
    "EngramReader",
    "EvaluatedRun",
    "MemoryConfig",
    "MemoryStore",
    "MoEConfig",
    "Model",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "RunError",
    "Sampling",
    "TokenMap",
    "TrainConfig",
    "__version__",
    "canonicalize",
    "evaluate",
    "export_run",
    "freeze",
    "hash_constants",
    "import_run",
    "load_run",
    "ngram_row_ids",
    "registries",
    "replace",
    "train",
]

_MODULES = {
    "engram_jax.config": (
        "AttentionConfig CheckpointConfig ConfigError DataConfig EngramConfig MemoryConfig MoEConfig ModelConfig "
        "OptimizerConfig RunConfig TrainConfig replace"
    ),
    "engram_jax.errors": "RunError",
    "engram_jax.evaluation.evaluate": "evaluate",
    "engram_jax.evaluation.evaluated_run": "EvaluatedRun",
    "engram_jax.inference.engine": "Engine",
    "engram_jax.inference.sampling": "Sampling",
    "engram_jax.interop.runs": "export_run import_run",
    "engram_jax.layers.engram": "EngramReader",
    "engram_jax.memory.compression": "TokenMap",
    "engram_jax.memory.dense_table": "DenseTable",
    "engram_jax.memory.frozen": "freeze",
    "engram_jax.memory.hashing": "canonicalize hash_constants ngram_row_ids",
    "engram_jax.memory.row_optimizers": "CatchUpAdam",
    "engram_jax.memory.store": "MemoryStore",
    "engram_jax.model": "Model",
    "engram_jax.plugin": "Engram",
    "engram_jax.runs.load": "load_run",
    "engram_jax.training.loop": "train",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "registries":
        return importlib.import_module("engram_jax.registries")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'engram_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
