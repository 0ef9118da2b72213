"""A study's report: results.jsonl (raw numbers), report.md (verdict, losses, budget) and study.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_jax.counts import num_rows
from engram_jax.files import write_text
from engram_jax.markdown import bullets, table
from experiments.studies.engine.declared import ACTIVE, FLOPS, TOKENS, TOTAL, Point, Study, by_series, quantities
from experiments.studies.engine.differences import compare, differences_table
from experiments.studies.engine.findings import findings
from experiments.studies.engine.finished_runs import FinishedRuns
from experiments.studies.engine.results import BITS, losses_by_seed, results
from experiments.studies.engine.sentences import sentences


def write_report(
    study: Study, points: Sequence[Point], seeds: int, study_dir: Path, known: FinishedRuns | None = None
) -> str:
    """Writes the three files from the runs that are finished or known, and returns report.md's text.

    Raises:
      ConfigError: a finished run has other settings than the study.
      RunError: nothing is finished, or runs saw different corpora.
    """
    from experiments.studies.engine.picture import draw

    rows = results(points, seeds, study_dir, known)
    text = report(study, points, seeds, rows)
    write_text(study_dir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    draw(study, points, rows, study_dir / "study.png")
    write_text(study_dir / "report.md", text)
    return text


def report(study: Study, points: Sequence[Point], seeds: int, rows: Sequence[dict[str, Any]]) -> str:
    """The text of report.md."""
    lines = [f"# {study.name}", "", study.question, "", "## Verdict", ""]
    for finding in findings(study, points, seeds, rows):
        lines += bullets(sentences(finding))
    if study.shape == "differences":
        lines += ["", "## Differences", "", *differences_table(compare(study, points, rows))]
    lines += ["", "## Losses", "", *losses_table(study, points, rows)]
    lines += ["", "## Budget", "", *budget_table(study, points), *budget_notes(study, points)]
    lines += caveats(study)
    return "\n".join(lines) + "\n"


def caveats(study: Study) -> list[str]:
    """The report's last part."""
    return ["", "## What this cannot tell", "", *bullets(study.caveats)] if study.caveats else []


def losses_table(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds of every point, and of its difference from the baseline."""
    losses, has_x = losses_by_seed(rows), study.shape != "differences"
    header = ["point", *([study.x_label] if has_x else []), "seeds", "validation loss", "against the baseline"]
    body = []
    for group in by_series(points).values():
        baseline = losses.get(study.baseline_of(group).name, {})
        for point in group:
            ours = losses.get(point.name, {})
            by = [loss - baseline[seed] for seed, loss in ours.items() if seed in baseline]
            bits = [row[BITS] for row in rows if row["point"] == point.name]
            cells = [point.name, *([f"{point.x:,.10g}"] if has_x else []), str(len(ours))]
            body.append([*cells, *map(_spread, (list(ours.values()), by, bits))])
    note = "Mean ± standard deviation over seeds; differences are paired by seed."
    return [*table([*header, "bits per byte"], body), "", note]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def budget_table(study: Study, points: Sequence[Point]) -> list[str]:
    """The costs. `Study.at` has proved that they are equal, but for what the study or a point varies."""
    has_x = study.shape != "differences"
    header = ["point", *([study.x_label] if has_x else []), "experts", "memory rows", TOTAL, ACTIVE, FLOPS, TOKENS]
    body = []
    for point in points:
        costs, model = quantities(point.config), point.config.model
        x = [f"{point.x:,.10g}"] if has_x else []
        counts = [model.moe.n_routed_experts, sum(num_rows(model).values()), *costs.values()]
        body.append([point.name, *x, *(f"{count:,.0f}" for count in counts)])
    return table(header, body)


def budget_notes(study: Study, points: Sequence[Point]) -> list[str]:
    """By how much the points that may differ from the others do differ."""
    lines = []
    for group in by_series(points).values():
        baseline = study.baseline_of(group)
        theirs = quantities(baseline.config)
        for point in group:
            ours = quantities(point.config)
            by = [_apart(name, ours[name] / theirs[name] - 1) for name in point.varies if ours[name] != theirs[name]]
            if by:
                lines.append(f"- {point.name} has {' and '.join(by)} than {baseline.name}.")
    return ["", *lines] if lines else []


def _apart(name: str, by: float) -> str:
    return f"{abs(by):.2%} {'fewer' if by < 0 else 'more'} {name}"
