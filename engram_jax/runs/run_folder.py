"""What a run writes about itself beside its checkpoints, and what must agree before they are read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError, RunConfig, differences, from_dict, to_dict
from engram_jax.data.loader import TextData
from engram_jax.distributed import exchange, is_first
from engram_jax.errors import RunError
from engram_jax.files import write_json
from engram_jax.memory import hashing
from engram_jax.runs.parts import Parts
from engram_jax.runs.settings import check_config
from engram_jax.version import __version__

FORMAT = 1
"""Of what a checkpoint holds and means; raised by a change that older code would read wrongly."""


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
    check_config(parts.config, from_dict(RunConfig, saved["config"]), "The checkpoint belongs to a run")
    for name, what in {"tokenizer_sha256": "tokenizer", "corpus_sha256": "corpus"}.items():
        if saved[name] != ours[name]:
            raise RunError(
                f"The {what} is not the one this run was trained on (sha256 {ours[name][:12]} here, "
                f"{saved[name][:12]} in the checkpoint): the run would not continue the same. Restore the {what}, "
                "or start anew in another --run_dir."
            )
    _check_constants(saved, parts)
