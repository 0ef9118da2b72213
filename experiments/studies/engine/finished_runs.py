"""Runs finished elsewhere, of which only a line of a results.jsonl remains."""

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
"""Field of a line that identifies the run's settings."""
NUMBERS, CORPUS = ("validation_loss", "bits_per_byte"), "corpus_sha256"
"""Fields of a line with the run's losses, and with the text that it saw."""
FinishedRuns = dict[tuple[str, int], dict[str, Any]]
"""The lines, by point and seed."""


def settings_of(config: RunConfig) -> str:
    """Fingerprint of the settings: equal for two runs with equal numbers."""
    return fingerprint(config, ignored=free_to_change())


def free_to_change() -> tuple[str, ...]:
    """Beginnings of the settings that do not matter for a run's numbers.

    A run may change these when it continues; but the amount of held-out text that the final loss is measured on
    matters here.
    """
    from engram_jax.runs.settings import FREE_TO_CHANGE

    return (*(path for path in FREE_TO_CHANGE if path != "train.eval_"), "train.eval_every:", "train.eval_batches:")


def check_numbers(finished: Any) -> None:
    """Raises `KeyError` or `ValueError` unless `finished` has the numbers of a finished run."""
    for name in NUMBERS:
        if not isinstance(finished[name], int | float) or not math.isfinite(finished[name]):
            raise ValueError(f"{name} is {finished[name]!r}")
    if not isinstance(finished[CORPUS], str):
        raise ValueError(f"{CORPUS} is {finished[CORPUS]!r}")


def runs_from_files(files: Sequence[Path], points: Sequence[Point], seeds: int | None) -> FinishedRuns:
    """The lines of the files that belong to these points, by their settings: another study may have trained the run.

    Args:
      seeds: only seeds below this number. None: all seeds of the files.

    Raises:
      ConfigError: a file cannot be read or has other lines, or no line is of these points.
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
        f"--results {' '.join(map(str, files))}: none of its {len(lines)} runs belongs to this study. They have other "
        "points, seeds or settings (data.corpus counts as it was written). Give the settings that they have.",
    )
    return known
