"""Runs that were finished elsewhere, known by their line of a results.jsonl alone: neither trained nor looked into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError, RunConfig
from experiments.fingerprint import fingerprint
from experiments.studies.declared import Point

SETTINGS = "settings"
Known = dict[tuple[str, int], dict[str, Any]]
"""By point and seed, the line."""


def settings_of(config: RunConfig) -> str:
    """What two runs must share to be the same one (engram_jax/training/run_folder.py says what they need not)."""
    from engram_jax.training.run_folder import FREE_TO_CHANGE

    return fingerprint(config, ignored=FREE_TO_CHANGE)


def known_runs(files: Sequence[Path], points: Sequence[Point], seeds: int) -> Known:
    """Of these points' runs, those that the files have under any name: another study may have trained them.

    Raises:
      ConfigError: no such file, or one that holds no raw numbers with their settings.
    """
    lines = {}
    for file in files:
        try:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            lines |= {(row[SETTINGS], row["seed"]): row for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"a line has no {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"--results {file}: not the raw numbers of a study ({reason}).") from None
    known: Known = {}
    for point in points:
        for seed in range(seeds):
            if row := lines.get((settings_of(point.seeded(seed)), seed)):
                known[point.name, seed] = row | {"point": point.name, "x": point.x, "series": point.series}
    return known
