"""The raw numbers of a study: one row for every finished run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.config import ConfigError
from engram_jax.errors import RunError
from experiments.studies.engine.declared import Point, quantities
from experiments.studies.engine.execute import check_finished, is_finished, run_dir
from experiments.studies.engine.finished_runs import CORPUS, NUMBERS, SETTINGS, FinishedRuns, check_numbers, settings_of

LOSS, BITS = NUMBERS


def results(
    points: Sequence[Point], seeds: int, study_dir: Path, known: FinishedRuns | None = None
) -> list[dict[str, Any]]:
    """One row per finished run: its losses as result.json has them, and what it cost; or the row that is known of it.

    Raises:
      ConfigError: a finished run has other settings than the study, or its result.json cannot be read.
      RunError: nothing is finished, or runs saw different corpora.
    """
    rows = []
    for point in points:
        for seed in range(seeds):
            folder = run_dir(study_dir, point, seed)
            if not is_finished(folder):
                rows += [row] if (row := (known or {}).get((point.name, seed))) else []
                continue
            check_finished(folder, point.seeded(seed))
            result = result_of(folder)
            costs = {name.replace(" ", "_"): number for name, number in quantities(point.config).items()}
            rows.append(
                {"point": point.name, "x": point.x, "series": point.series, "seed": seed}
                | {SETTINGS: settings_of(point.seeded(seed))}
                | {LOSS: result["loss"], BITS: result[BITS], **costs}
                | {"buckets": result.get("buckets", {}), CORPUS: result[CORPUS]}
            )
    if not rows:
        raise RunError(f"{study_dir} has no finished run yet: train them with the same command, without --report_only.")
    corpora = {row[CORPUS]: f"{row['point']}-seed{row['seed']}" for row in rows}
    if len(corpora) > 1:
        raise RunError(
            f"Runs of {study_dir} saw different corpora ({', '.join(corpora.values())} for instance): the text changed "
            "during the study. Restore it and delete the runs that saw the other text, or start again in another --out."
        )
    return rows


def result_of(folder: Path) -> dict[str, Any]:
    """A finished run's result.json.

    Raises:
      ConfigError: it cannot be read, or has no losses.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
        check_numbers(result | {LOSS: result["loss"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"{folder}/result.json cannot be read ({reason}): delete it to train the run again."
        ) from None
    return result


def losses_by_seed(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """By point, then by seed: the losses of finished runs."""
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["point"], {})[row["seed"]] = row[LOSS]
    return losses


def complete(points: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], np.ndarray]:
    """The seeds for which every one of the points is finished, and their losses [P, S]."""
    losses = losses_by_seed(rows)
    whole = set.intersection(*(set(losses.get(point.name, {})) for point in points)) if points else set()
    seeds = sorted(whole)
    return seeds, np.array([[losses[point.name][seed] for seed in seeds] for point in points], float)
