"""Results side by side: one column per run (and per memory scale), one row per metric, aligned Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.evaluation.paper_results import PaperTable
from engram_jax.evaluation.results import metric_of
from engram_jax.evaluation.statistics import Metric, difference

BUCKETED = {
    "by_ngram_frequency": "occurrences of the last n-gram in training",
    "by_position": "position in the document",
}
"""Details with losses by bucket."""
PAPER_LENGTH = "32768"
PAIRED = {"loss": "tokens", "bits_per_byte": "bytes"}
"""Metrics that are compared document by document, and what each document weighs."""


@dataclass(frozen=True)
class Column:
    """Everything measured on one run under one memory scale; of equal measurements the newest."""

    label: str
    tasks: Mapping[str, dict[str, Any]]
    """By the task's name as given, and the text it read: `perplexity`, `perplexity on books`."""


def columns(records: Sequence[tuple[Path, dict[str, Any]]]) -> list[Column]:
    """One column for each run and scale, in the order in which they first come; `records` oldest first within a run."""
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


def render(found: Sequence[Column], paper: Sequence[PaperTable] = ()) -> str:
    """The table in Markdown that lines up as text; then notes, then the paper's tables with the runs beside them."""
    words = list(dict.fromkeys(word for column in found for word in column.tasks))
    rows, notes = [], []
    for word in words:
        of_task = [column.tasks.get(word) for column in found]
        for name in dict.fromkeys(name for task in of_task if task for name in task["metrics"]):
            metrics = [
                metric_of(task["metrics"][name]) if task and name in task["metrics"] else None for task in of_task
            ]
            unit = next(metric.unit for metric in metrics if metric)
            rows.append([f"{word}: {name}" + (f" ({unit})" if unit else ""), *map(cell, metrics)])
            if name in PAIRED and len(found) > 1:
                rows.append([f"{word}: {name}, minus {found[0].label}", *_paired(of_task, name)])
        notes += _not_comparable(word, found, of_task)
    lines = [*markdown(["", *[column.label for column in found]], rows), *(["", *notes] if notes else [])]
    for title, bucket_rows in _buckets(words, found):
        lines += ["", *markdown([title, *[column.label for column in found]], bucket_rows)]
    for table in paper:
        lines += ["", *_beside_the_paper(table, found)]
    return "\n".join(lines) + "\n"


def cell(metric: Metric | None) -> str:
    """`4.0842 ± 0.0312`: value and standard error."""
    if metric is None or not math.isfinite(metric.value):
        return "-"
    digits = 4 if abs(metric.value) < 100 else 2
    stderr = "" if metric.stderr is None else f" ± {metric.stderr:.{digits}f}"
    return f"{metric.value:.{digits}f}{stderr}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [header, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in cells]


def _paired(of_task: Sequence[dict[str, Any] | None], name: str) -> list[str]:
    """Each run's difference from the first, document by document; `-` where they scored different tokens."""
    first, cells = of_task[0], ["-"]
    for task in of_task[1:]:
        if first is None or task is None or not _same_tokens(first, task):
            cells.append("-")
            continue
        per_document = [np.array(x["details"]["per_document"]["loss"]) for x in (task, first)]
        sizes = np.array(task["details"]["per_document"][PAIRED[name]])
        paired = difference(*per_document, sizes).scaled(1 / math.log(2) if name == "bits_per_byte" else 1.0, "")
        cells.append(("+" if paired.value >= 0 else "") + cell(paired))
    return cells


def _same_tokens(a: dict[str, Any], b: dict[str, Any]) -> bool:
    keys = ("documents_sha256", "context", "stride")
    return all(key in a["details"] and a["details"][key] == b["details"].get(key) for key in keys)


def _not_comparable(word: str, found: Sequence[Column], of_task: Sequence[dict[str, Any] | None]) -> list[str]:
    """One line for each run that scored other tokens than the first, or in other windows."""
    first = of_task[0]
    if first is None or "documents_sha256" not in first["details"]:
        return []
    return [
        f"{word}: {column.label} scored other tokens than {found[0].label}, or in other windows: only bits per byte of "
        "the same text can be compared."
        for column, task in zip(found[1:], of_task[1:], strict=True)
        if task is not None and not _same_tokens(first, task)
    ]


def _buckets(words: Sequence[str], found: Sequence[Column]) -> list[tuple[str, list[list[str]]]]:
    """For each task whose details hold losses by something: a title, and a row for each bucket that any run has."""
    tables = []
    for word in words:
        for key, what in BUCKETED.items():
            of_task = [column.tasks.get(word, {}).get("details", {}).get(key) or {} for column in found]
            rows = []
            for name in dict.fromkeys(name for buckets in of_task for name in buckets):
                share = next(buckets[name]["share"] for buckets in of_task if name in buckets)
                losses = [
                    cell(metric_of({"value": buckets[name]["loss"], "stderr": buckets[name]["stderr"]}))
                    if name in buckets
                    else "-"
                    for buckets in of_task
                ]
                rows.append([f"{name} ({share:.1%} of tokens)", *losses])
            if rows:
                tables.append((f"{word}: loss by {what}", rows))
    return tables


def _beside_the_paper(table: PaperTable, found: Sequence[Column]) -> list[str]:
    rows = []
    for row in table.rows:
        digits = max(len(str(value).partition(".")[2]) for value in row.values)  # as printed: 1.960 beside 2.091
        ours = [_ours(column, row.ours, row.scale) for column in found]
        rows.append([row.name, *ours, *[f"{value:.{digits}f}" for value in row.values]])
    header = [f"the paper's {table.title}", *[column.label for column in found], *table.models]
    return markdown(header, rows)


def _ours(column: Column, patterns: Sequence[str], scale: float) -> str:
    """What the run has of a row, in the paper's unit; a length that is not the paper's (`vt@512`) is named."""
    for pattern in patterns:
        of_task, _, of_metric = pattern.partition("/")
        fitting = [
            (name, metric)
            for word, task in column.tasks.items()
            if fnmatchcase(word, of_task)
            for name, metric in task["metrics"].items()
            if fnmatchcase(name, of_metric)
        ]
        if fitting:
            lengths = [length if (length := name.rpartition("@")[2]).isdigit() else "0" for name, _ in fitting]
            name, metric = max(zip(lengths, fitting, strict=True), key=lambda pair: int(pair[0]))[1]
            length = name.rpartition("@")[2]
            where = f" at {length}" if "@" in of_metric and length != PAPER_LENGTH else ""
            return cell(metric_of(metric).scaled(scale, "")) + where
    return "-"
