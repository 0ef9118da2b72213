"""Runs that were finished elsewhere, known by their line of a results.jsonl alone: neither trained nor looked into."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError, RunConfig, require
from experiments.runs.fingerprint import fingerprint
from experiments.studies.engine.declared import Point

SETTINGS = "settings"
NUMBERS, CORPUS = ("validation_loss", "bits_per_byte"), "corpus_sha256"
"""Of a run that has finished: its losses, and the text it saw."""
FinishedRuns = dict[tuple[str, int], dict[str, Any]]
"""By point and seed, the line."""


def settings_of(config: RunConfig) -> str:
    """What two runs must share to be the same one."""
    return fingerprint(config, ignored=free_to_change())


def free_to_change() -> tuple[str, ...]:
    """Beginnings of the settings that do not matter here: those that a run may change when it continues, but for how
    much held-out text its loss at the end is measured on."""
    from engram_jax.runs.settings import FREE_TO_CHANGE

    return (*(path for path in FREE_TO_CHANGE if path != "train.eval_"), "train.eval_every:", "train.eval_batches:")


def check_numbers(finished: Any) -> None:
    """Raises `KeyError` or `ValueError` unless these are the numbers of a run that has finished."""
    for name in NUMBERS:
        if not isinstance(finished[name], int | float) or not math.isfinite(finished[name]):
            raise ValueError(f"{name} is {finished[name]!r}")
    if not isinstance(finished[CORPUS], str):
        raise ValueError(f"{CORPUS} is {finished[CORPUS]!r}")


def runs_from_files(files: Sequence[Path], points: Sequence[Point], seeds: int | None) -> FinishedRuns:
    """Of these points' runs, those that the files have under any name: another study may have trained them.

    Args:
      seeds: only those below. None: all that the files have.

    Raises:
      ConfigError: no such file, one that holds no raw numbers with their settings, or none of these points.
    """
    lines = {}
    for file in files:
        try:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            for row in rows:
                check_numbers(row)
            lines |= {(row[SETTINGS], int(row["seed"])): row for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"a line has no {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"--results {file}: not the raw numbers of a study ({reason}).") from None
    known: FinishedRuns = {}
    numbers = sorted({seed for _, seed in lines if seeds is None or seed in range(seeds)})
    for point in points:
        for seed in numbers:
            if row := lines.get((settings_of(point.seeded(seed)), seed)):
                known[point.name, seed] = row | {"point": point.name, "x": point.x, "series": point.series}
    require(
        bool(known) or not files,
        f"--results {' '.join(map(str, files))}: none of the {len(lines)} runs there is one of this study's: other "
        "points, seeds or settings (data.corpus among them, as it was given). Give the settings that they have.",
    )
    return known
