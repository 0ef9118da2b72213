"""A short name for a run's settings: equal names, equal settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from engram_jax.config import RunConfig, differences

DERIVED = ("name:", "model.engram.engram_compressed_vocab_size:")
"""What says nothing about the settings: the run's own name, and what its tokenizer makes of them."""


def fingerprint(config: RunConfig, *more: str, ignored: Sequence[str] = ()) -> str:
    """12 hex digits of the settings that are not at their default (a new setting renames no run), and of `more`.

    Args:
      ignored: beginnings of the paths of settings that do not matter.
    """
    lines = [line for line in differences(config, RunConfig()) if not line.startswith((*DERIVED, *ignored))]
    return hashlib.sha256("\n".join([*lines, *more]).encode()).hexdigest()[:12]
