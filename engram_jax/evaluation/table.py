"""Results side by side: one column per run (and per memory scale), one row per metric, aligned Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.evaluation.paper_results import PaperRow, PaperTable
from engram_jax.evaluation.results import metric_of
from engram_jax.evaluation.statistics import Metric, difference
from engram_jax.markdown import table

BUCKETED = {
    "by_ngram_frequency": "occurrences of the last n-gram in training",
    "by_position": "position in the document",
}
"""Details that hold losses by bucket, and what the buckets are."""
PAPER_LENGTH = "32768"
PAIRED = {"loss": "tokens", "bits_per_byte": "bytes"}
"""Metrics that are compared document by document, and the weight of each document."""
ERROR_NOTE = (
    "±: standard error by the choice of documents (of questions, where a task asks them). Another seed of training is "
    "not in it: engram-jax compare shows that spread."
)
PAIRED_NOTE = (
    "minus: the difference from the first run on the same tokens, document by document. What makes a document hard for "
    "both runs drops out, so its ± is smaller than the ± of each loss."
)


# --- values ---


@dataclass(frozen=True)
class Column:
    """Everything measured on one run under one memory scale; of equal measurements the newest."""

    label: str
    tasks: Mapping[str, dict[str, Any]]
    """By the task's name as given, and the text it read: `perplexity`, `perplexity on books`."""


@dataclass(frozen=True)
class Row:
    """One number of all runs."""

    task: str
    name: str
    """Of the metric or of the bucket."""
    cells: tuple[Metric | None, ...]
    """One for each column; None: not measured, or not comparable."""
    minus: str = ""
    """The run that was subtracted, where the cells are paired differences."""
    share: float | None = None
    """Of a bucket: its share of the tokens."""


@dataclass(frozen=True)
class Results:
    """What the table shows."""

    labels: tuple[str, ...]
    metrics: tuple[Row, ...]
    buckets: Mapping[tuple[str, str], tuple[Row, ...]]
    """By task and by what its buckets are."""
    not_comparable: tuple[tuple[str, str], ...]
    """(task, run) that scored other tokens than the first run, or in other windows."""


def columns(records: Sequence[tuple[Path, dict[str, Any]]]) -> list[Column]:
    """One column for each run and scale, in the order in which they first come.

    Args:
      records: (run's folder, saved record), the oldest first within a run.
    """
    names: dict[str, set[Path]] = {}
    for path, record in records:
        names.setdefault(record["run"]["name"], set()).add(path.resolve())
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, record in records:
        name = record["run"]["name"]
        label = (name if len(names[name]) == 1 else str(path)) + scale_label(record.get("memory_scale", {}))
        corpus = record["shared"]["corpus"]
        for word, task in record["tasks"].items():
            where = f" on {Path(corpus).name}" if corpus and "corpus" in task["details"] else ""
            found.setdefault(label, {})[word + where] = task
    return [Column(label, tasks) for label, tasks in found.items()]


def scale_label(scales: Mapping[str, float]) -> str:
    """` (memory 0)`, ` (memory 1=0 2=0.5)`, or nothing where the memory is as trained."""
    factors = set(scales.values())
    if factors <= {1.0}:
        return ""
    if len(factors) == 1:
        return f" (memory {factors.pop():g})"
    return f" (memory {' '.join(f'{layer}={scale:g}' for layer, scale in scales.items())})"


def side_by_side(found: Sequence[Column]) -> Results:
    """The columns' numbers by row, with each run's difference from the first."""
    words = list(dict.fromkeys(word for column in found for word in column.tasks))
    rows, buckets, others = [], {}, []
    for word in words:
        of_task = [column.tasks.get(word) for column in found]
        for name in dict.fromkeys(name for task in of_task if task for name in task["metrics"]):
            cells = (metric_of(task["metrics"][name]) if task and name in task["metrics"] else None for task in of_task)
            rows.append(Row(word, name, tuple(cells)))
            if name in PAIRED and len(found) > 1:
                differences = (paired(task, of_task[0], name) for task in of_task[1:])
                rows.append(Row(word, name, (None, *differences), minus=found[0].label))
        first = of_task[0]
        if first is not None and "documents_sha256" in first["details"]:
            pairs = zip(found[1:], of_task[1:], strict=True)
            others += [(word, column.label) for column, task in pairs if task and not same_tokens(first, task)]
        for key, what in BUCKETED.items():
            if of_kind := _buckets(word, [(task or {}).get("details", {}).get(key) or {} for task in of_task]):
                buckets[word, what] = of_kind
    return Results(tuple(column.label for column in found), tuple(rows), buckets, tuple(others))


def paired(ours: dict[str, Any] | None, theirs: dict[str, Any] | None, name: str) -> Metric | None:
    """A run's difference from another, document by document; None where they scored different tokens."""
    if ours is None or theirs is None or not same_tokens(ours, theirs):
        return None
    our_losses, their_losses = (np.array(task["details"]["per_document"]["loss"]) for task in (ours, theirs))
    sizes = np.array(ours["details"]["per_document"][PAIRED[name]])
    return difference(our_losses, their_losses, sizes).scaled(1 / math.log(2) if name == "bits_per_byte" else 1.0, "")


def same_tokens(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results are of the same tokens in the same windows."""
    keys = ("documents_sha256", "context", "stride")
    return all(key in a["details"] and a["details"][key] == b["details"].get(key) for key in keys)


def _buckets(word: str, of_task: Sequence[Mapping[str, dict[str, Any]]]) -> tuple[Row, ...]:
    """A row for each bucket that any run has."""
    return tuple(
        Row(
            word,
            name,
            tuple(
                metric_of({"value": buckets[name]["loss"], "stderr": buckets[name]["stderr"]})
                if name in buckets
                else None
                for buckets in of_task
            ),
            share=next(buckets[name]["share"] for buckets in of_task if name in buckets),
        )
        for name in dict.fromkeys(name for buckets in of_task for name in buckets)
    )


def ours(column: Column, row: PaperRow) -> tuple[Metric, str] | None:
    """A run's number for a row of the paper, in the paper's unit, and its length in tokens ("" without one).

    The first pattern that fits counts, and of its metrics the one of the greatest length; None: nothing fits.
    """
    for pattern in row.ours:
        of_task, _, of_metric = pattern.partition("/")
        fitting = [
            (name.rpartition("@")[2] if "@" in of_metric else "", metric)
            for word, task in column.tasks.items()
            if fnmatchcase(word, of_task)
            for name, metric in task["metrics"].items()
            if fnmatchcase(name, of_metric)
        ]
        if fitting:
            length, metric = max(fitting, key=lambda one: int(one[0]) if one[0].isdigit() else 0)
            return metric_of(metric).scaled(row.scale, ""), length
    return None


# --- text ---


def render(found: Sequence[Column], paper: Sequence[PaperTable] = ()) -> str:
    """The table in Markdown that lines up as text; then notes, then the paper's tables with the runs beside them."""
    results = side_by_side(found)
    shown = [cell for row in results.metrics for cell in row.cells if cell]
    notes = [ERROR_NOTE] if any(cell.stderr is not None for cell in shown) else []
    notes += [PAIRED_NOTE] if any(row.minus and any(row.cells) for row in results.metrics) else []
    notes += [
        f"{task}: {run} scored other tokens than {results.labels[0]}, or in other windows. Only bits per byte of the "
        "same text can be compared."
        for task, run in results.not_comparable
    ]
    lines = table(["", *results.labels], [[_head(row), *map(_cell_of(row), row.cells)] for row in results.metrics])
    for note in notes:
        lines += ["", note]
    for (task, what), rows in results.buckets.items():
        body = [[f"{row.name} ({row.share:.1%} of tokens)", *map(cell, row.cells)] for row in rows]
        lines += ["", *table([f"{task}: loss by {what}", *results.labels], body)]
    for one in paper:
        lines += ["", *_beside_the_paper(one, found)]
    return "\n".join(lines) + "\n"


def _head(row: Row) -> str:
    if row.minus:
        return f"{row.task}: {row.name}, minus {row.minus}"
    unit = next(metric.unit for metric in row.cells if metric)
    return f"{row.task}: {row.name}" + (f" ({unit})" if unit else "")


def _cell_of(row: Row):
    return signed if row.minus else cell


def cell(metric: Metric | None) -> str:
    """`4.0842 ± 0.0312`: value and standard error; `-` for what was not measured."""
    if metric is None or not math.isfinite(metric.value):
        return "-"
    digits = 4 if abs(metric.value) < 100 else 2
    stderr = "" if metric.stderr is None else f" ± {metric.stderr:.{digits}f}"
    return f"{metric.value:.{digits}f}{stderr}"


def signed(metric: Metric | None) -> str:
    """`cell` with the sign of a difference."""
    text = cell(metric)
    return f"+{text}" if metric is not None and metric.value >= 0 else text


def _beside_the_paper(paper: PaperTable, found: Sequence[Column]) -> list[str]:
    rows = []
    for row in paper.rows:
        digits = max(len(str(value).partition(".")[2]) for value in row.values)  # as printed: 1.960 beside 2.091
        rows.append([row.name, *(_ours(column, row) for column in found), *[f"{x:.{digits}f}" for x in row.values]])
    return table([f"the paper's {paper.title}", *[column.label for column in found], *paper.models], rows)


def _ours(column: Column, row: PaperRow) -> str:
    """Our number; a length that is not the paper's is named."""
    found = ours(column, row)
    if found is None:
        return "-"
    metric, length = found
    return cell(metric) + (f" at {length}" if length not in ("", PAPER_LENGTH) else "")
