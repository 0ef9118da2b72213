"""A run's settings as its folder holds them, and which of them may change when it goes on. Imports no jax."""

from __future__ import annotations

import json
from pathlib import Path

from engram_jax.config import ConfigError, RunConfig, differences, from_dict
from engram_jax.errors import RunError

# Settings that may change when a run continues: none touches the numbers of the training steps, but for the rounding of
# sums that another mesh or other parts of a batch take in another order.
FREE_TO_CHANGE = (
    "train.log_every",
    "train.eval_",
    "train.tensorboard",
    "train.mesh_",
    "train.grad_accum",
    "checkpoint.",
    "data.worker_count",
    "data.cache_dir",
    "model.remat",
    "memory.placement",
    "memory.transport",
    "memory.prefetch",
    "memory.hot_rows",
    "memory.promote_every",
    "memory.mmap_dir",
    "memory.monitor_every",
)


def read_config(run_dir: Path) -> RunConfig:
    """The settings of the run in this folder.

    Raises:
      RunError: the folder is not a run: it has no config.json.
      ConfigError: its config.json cannot be read.
    """
    path = run_dir / "config.json"
    try:  # read at once: Path.exists raises PermissionError below a folder that one may not enter, before Python 3.14
        return from_dict(RunConfig, json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{run_dir} is not a run: it has no config.json. Train one with `engram-jax train`.") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as the settings of a run ({error}): restore it.") from None


def check(run_dir: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if the folder holds a run with other settings."""
    if (run_dir / "config.json").exists():
        check_config(config, read_config(run_dir), f"{run_dir} holds a run")


def check_config(ours: RunConfig, theirs: RunConfig, whose: str) -> None:
    changed = differences(ours, theirs)
    changed = [line for line in changed if not line.startswith(FREE_TO_CHANGE)]
    if changed:
        raise ConfigError(
            f"{whose} with other settings ({'; '.join(changed)}). "
            "Give this one its own --run_dir, or delete that folder to start again."
        )
