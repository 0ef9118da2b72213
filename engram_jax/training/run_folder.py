"""What a run's folder says about it, and what must agree before its checkpoints mean anything."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from engram_jax import __version__
from engram_jax.config import ConfigError, RunConfig, differences, from_dict, replace, to_dict
from engram_jax.data.loader import TextData
from engram_jax.data.tokenizer import load_tokenizer
from engram_jax.memory import hashing
from engram_jax.sharding import BATCH, MESH_AXES
from engram_jax.training.assembly import Parts, assemble
from engram_jax.training.checkpoint import Checkpoints
from engram_jax.training.distributed import exchange, is_first
from engram_jax.training.errors import RunError
from engram_jax.training.state import TrainState

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
    "memory.sight_every",
)

FORMAT = 1
"""Of what a checkpoint holds and means; raised by a change that older code would read wrongly."""


def load_run(
    run_dir: Path,
    log: Callable[[str], None] = print,
    tables: bool = True,
    *,
    mesh: Mapping[str, int] | None = None,
    placement: str = "",
) -> tuple[TrainState, Parts]:
    """A trained run's newest state and parts, without its corpus: for sampling and analysis.

    Args:
      tables: False leaves them on the disk, in `tables_of(run_dir, step)`.
      mesh, placement: see `for_use`; the first devices are taken.

    Raises:
      ConfigError: the mesh does not fit the model or the devices.
      RunError: the folder is not a run, has no checkpoint, or another tokenizer than it was trained with.
    """
    if not os.path.exists(run_dir / "config.json"):
        raise RunError(f"{run_dir} is not a run: it has no config.json. Train one with python -m experiments.run.")
    config = read_config(run_dir)
    tokenizer, num_devices = load_tokenizer(run_dir / "tokenizer.json"), math.prod((mesh or {}).values())
    parts = assemble(for_use(config, mesh, placement), tokenizer.backend, jax.devices()[:num_devices])
    with (
        jax.set_mesh(parts.mesh),
        Checkpoints(run_dir / "checkpoints", config.checkpoint, parts, log, read_only=True) as checkpoints,
    ):

        def can_be_read(saved: dict[str, Any]) -> None:
            if saved.get("vocab_sha256", tokenizer.vocab_sha256) != tokenizer.vocab_sha256:
                raise RunError(f"{run_dir}/tokenizer.json is not the tokenizer this run was trained with: restore it.")
            check_readable(saved, parts)

        state = checkpoints.restore(parts.abstract_state(), can_be_read, tables)
    if state is None:
        raise RunError(f"{run_dir} has no checkpoint yet: let the run reach its first one.")
    return state, parts


def on_one_device(config: RunConfig) -> RunConfig:
    """The same run for sampling, analysis and interchange, whatever it was trained on."""
    return for_use(config)


def for_use(config: RunConfig, mesh: Mapping[str, int] | None = None, placement: str = "") -> RunConfig:
    """The same run for whole programs without a trainer, on other devices than it was trained on.

    Args:
      mesh: devices on the mesh axes, `{"tensor": 4}`. None: one device.
      placement: where the tables lie. Empty: as in training, `host` for tiered and numpy, which programs cannot reach.
    """
    inside = {"tiered": "host", "numpy": "host"}.get(config.memory.placement, config.memory.placement)
    sizes = dict.fromkeys(MESH_AXES, 1) | dict(mesh or {})
    return replace(
        config,
        **{f"train__mesh_{axis}": size for axis, size in sizes.items()},
        train__grad_accum=1,
        data__batch_size=math.prod(sizes[axis] for axis in BATCH),
        memory__placement=placement or inside,
        memory__mmap_dir="",
    )


def tables_of(run_dir: Path, step: int) -> Path:
    """The folder with one table (memory/table_files.py) per Engram layer of a run's checkpoint."""
    return run_dir / "checkpoints" / str(step) / "tables"


def has_checkpoint(run_dir: Path) -> bool:
    return any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))


def check(run_dir: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if the folder holds a run with other settings."""
    if (run_dir / "config.json").exists():
        _check_config(config, read_config(run_dir), f"{run_dir} holds a run")


def read_config(run_dir: Path) -> RunConfig:
    """A run's settings.

    Raises:
      ConfigError: its config.json cannot be read.
    """
    path = run_dir / "config.json"
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as the settings of a run ({error}): restore it.") from None


OWN = ("data.cache_dir", "memory.mmap_dir")
"""Settings in which the processes of a run may differ: folders of each host's own."""


def check_alike(ours: dict[str, Any]) -> None:
    """Every process must have the same text, tokenizer and settings, or their batches would be parts of nothing.

    Args:
      ours: this process's `meta`.

    Raises:
      ConfigError: on all processes, if one has others than process 0.
    """
    config = from_dict(RunConfig, ours["config"])
    settings = [line for line in differences(config, RunConfig()) if not line.startswith(OWN)]
    said = {name: ours[f"{name}_sha256"][:12] for name in ("corpus", "tokenizer")} | {"settings": settings}
    first, *others = map(json.loads, exchange(json.dumps(said)))
    for number, theirs in enumerate(others, start=1):
        if what := [name for name in said if theirs[name] != first[name]]:
            lines = sorted(set(theirs["settings"]) ^ set(first["settings"]))
            detail = f" ({'; '.join(lines[:4])})" if lines else ""
            raise ConfigError(
                f"Process {number} has another {' and other '.join(what)} than process 0{detail}: give every process "
                "of a run the same command, and each host the same text and tokenizer, or one copy that all share."
            )


def _check_config(ours: RunConfig, theirs: RunConfig, whose: str) -> None:
    changed = differences(ours, theirs)
    changed = [line for line in changed if not line.startswith(FREE_TO_CHANGE)]
    if changed:
        raise ConfigError(
            f"{whose} with other settings ({'; '.join(changed)}). "
            "Give this one its own --run_dir, or delete that folder to start again."
        )


def describe(run_dir: Path, config: RunConfig, text: TextData) -> None:
    """Writes config.json and tokenizer.json, which the checkpoints need; only once nothing speaks against the run."""
    if is_first():
        text.tokenizer.save(run_dir / "tokenizer.json")
        write_json(run_dir / "config.json", to_dict(config))


def meta(config: RunConfig, text: TextData, parts: Parts) -> dict[str, Any]:
    """What a checkpoint says beside its arrays."""
    return {
        "format": FORMAT,
        "version": __version__,
        "config": to_dict(config),
        "hash_constants": parts.store.constants.to_dict(),
        "tokenizer_sha256": text.tokenizer.sha256,
        "vocab_sha256": text.tokenizer.vocab_sha256,
        "corpus_sha256": text.corpus_sha256,
    }


def _check_format(saved: dict[str, Any]) -> None:
    if saved.get("format", 1) > FORMAT:
        raise RunError(
            f"The checkpoint was written by engram_jax {saved.get('version')} in format {saved['format']}, and this is "
            f"{__version__}, which reads formats up to {FORMAT}: use that version or a newer one."
        )


def _check_constants(saved: dict[str, Any], parts: Parts) -> None:
    lines = hashing.differences(parts.store.constants, hashing.HashConstants.from_dict(saved["hash_constants"]))
    if lines:
        raise RunError(
            f"The checkpoint's memory was addressed otherwise, so every row would be wrong ({'; '.join(lines)[:600]}). "
            "Use the tokenizer and the engram_* settings it was trained with."
        )


def check_readable(saved: dict[str, Any], parts: Parts) -> None:
    """Raises `RunError` if a checkpoint's arrays do not mean what `parts` takes them for."""
    _check_format(saved)
    _check_constants(saved, parts)


def check_meta(saved: dict[str, Any], ours: dict[str, Any], parts: Parts) -> None:
    """Raises `ConfigError` or `RunError` if a checkpoint is not this run's."""
    _check_format(saved)
    if saved.get("imported_from"):
        raise RunError(
            f"This run was imported from {saved['imported_from']}, which holds no optimizer state: it cannot be "
            "continued, only read. Train on in another --run_dir with train.init_from and this folder."
        )
    _check_config(parts.config, from_dict(RunConfig, saved["config"]), "The checkpoint belongs to a run")
    for name, what in {"tokenizer_sha256": "tokenizer", "corpus_sha256": "corpus"}.items():
        if saved[name] != ours[name]:
            raise RunError(
                f"The {what} is not the one this run was trained on (sha256 {ours[name][:12]} here, "
                f"{saved[name][:12]} in the checkpoint): the run would not continue the same. Restore the {what}, "
                "or start anew in another --run_dir."
            )
    _check_constants(saved, parts)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Atomic."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)
