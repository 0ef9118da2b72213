"""What the reports and results.jsonl of all analyses share: rows of numbers, and notes on their errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.files import write_text


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines atomically. A number that could not be measured is null."""
    write_text(path, "".join(json.dumps(_without_nan(row)) + "\n" for row in rows))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def number(value: float | None) -> float:
    """A number as `write_rows` wrote it: null is NaN."""
    return float("nan") if value is None else float(value)


def described(by: OverSeeds) -> dict[str, Any]:
    """The columns of a row for one number; `by_seed` is in the order of the study's seeds."""
    return {"mean": by.mean, "stderr_documents": by.stderr, "std_seeds": by.std, "by_seed": by.values}


def over_seeds(row: Mapping[str, Any]) -> OverSeeds:
    """The number that a row of `described` holds."""
    by_seed = row["by_seed"]
    values = by_seed.values() if isinstance(by_seed, Mapping) else by_seed
    return OverSeeds(tuple(map(number, values)), row["stderr_documents"])


def error_note(seeds: Sequence[int]) -> str:
    """What the numbers after ± and in brackets are."""
    if len(seeds) < 2:
        return "±: standard error by the choice of documents. With one seed, the spread over seeds is unknown."
    return f"±: standard error by the choice of documents; in brackets: standard deviation over the {len(seeds)} seeds."


def mark_note(numbers: Iterable[OverSeeds]) -> str:
    """What a picture's bars, lines and dots are; only those that are drawn."""
    numbers, marks = list(numbers), ["bar: mean"]
    if any(by.stderr is not None for by in numbers):
        marks.append("line: ± standard error by documents")
    if any(len(by.values) > 1 for by in numbers):
        marks.append("dots: seeds")
    return "; ".join(marks)


def spread_name(seeds: Sequence[int]) -> str:
    """What a difference that `OverSeeds.differs_from` finds is larger than."""
    return "more than the spread" if len(seeds) > 1 else "more than the choice of documents"
