"""A study's report: results.jsonl (raw numbers), report.md (verdict, losses, budget) and study.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.counts import num_rows
from experiments.studies.engine import differences, fits
from experiments.studies.engine.declared import ACTIVE, FLOPS, TOKENS, TOTAL, Point, Study, by_series, quantities
from experiments.studies.engine.files import write_text
from experiments.studies.engine.finished_runs import FinishedRuns
from experiments.studies.engine.results import BITS, complete, losses_by_seed, results


def write_report(
    study: Study, points: Sequence[Point], seeds: int, study_dir: Path, known: FinishedRuns | None = None
) -> str:
    """Writes the three files from what is finished or known, and returns report.md's text.

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
    """report.md."""
    lines = [f"# {study.name}", "", study.question, "", "## Verdict", ""]
    lines += [f"- {sentence}" for sentence in verdict(study, points, seeds, rows)]
    if study.shape == "differences":
        compared = differences.compare(study, points, rows)
        lines += ["", "## Differences", ""]
        lines += differences.differences_table(compared, differences.papers_differences(study))
    lines += ["", "## Losses", "", *losses_table(study, points, rows)]
    lines += ["", "## Budget", "", *budget_table(study, points), *budget_notes(study, points)]
    if study.caveats:
        lines += ["", "## What this cannot tell", "", *(f"- {caveat}" for caveat in study.caveats)]
    return "\n".join(lines) + "\n"


def verdict(study: Study, points: Sequence[Point], seeds: int, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers say, a sentence each."""
    sentences, missing = [], len(points) * seeds - len(rows)
    if missing:
        sentences.append(f"NOT finished: {missing} of {len(points) * seeds} runs are missing.")
    if study.shape == "differences":
        compared, paper = differences.compare(study, points, rows), differences.papers_differences(study)
        return [*sentences, *differences.verdict(compared, study.baseline_of(points).name, paper)]
    groups = by_series(points)
    for series, group in groups.items():
        head = f"{series}: " if series else ""
        sentences += [head + sentence for sentence in _on_series(study, group, rows)]
    if study.shape == "log_line" and len(groups) == 2:
        sentences += _between_lines(groups, rows)
    if study.shape == "valley":
        sentences += _between_valleys(study, groups, rows)
    return sentences


def _on_series(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> list[str]:
    assert study.shape != "differences"
    which, loss_PS = complete(points, rows)
    if not which:
        return ["No seed has all its points yet, so nothing is compared."]
    x_P = np.array([point.x for point in points])
    curve = fits.fit(study.shape, x_P, loss_PS)
    if curve is None:
        need = "two seeds" if len(which) < 2 else "more points"
        sentences = [f"No curve is fitted: that takes {need}; with less, its spread is unknown."]
    else:
        sentences = [fits.sentence(curve, x_P, study.x_label)]
    names = [point.name for point in points]
    best = int(loss_PS.mean(axis=1).argmin())
    baseline = points.index(study.baseline_of(points))
    if best == baseline:
        return [*sentences, f"No point is better than {names[baseline]}, the baseline."]
    against = fits.difference(loss_PS[best], loss_PS[baseline], names[best], names[baseline])
    flattered = f" It is the best of {len(names)} points by the same losses, which flatters it."
    return [*sentences, against + flattered]


def _between_lines(groups: dict[str, list[Point]], rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far apart two series' lines lie, seed by seed, and by how much x they differ where both are lines."""
    (ours, theirs), (a, b) = groups, groups.values()
    which, loss_PS = complete([*a, *b], rows)
    if not which or min(len(a), len(b)) < 2:
        return []
    x_P, x_Q = (np.array([point.x for point in group]) for group in (a, b))
    if max(x_P.min(), x_Q.min()) > min(x_P.max(), x_Q.max()):
        return [f"{ours} and {theirs} have no x in common, so their lines are not compared."]
    ours_PS, theirs_QS = loss_PS[: len(a)], loss_PS[len(a) :]
    middle, by_S = fits.offset(x_P, ours_PS, x_Q, theirs_QS)
    sentence = fits.difference(by_S, np.zeros(len(by_S)), f"{ours}'s line at x = {middle:,.0f}", f"{theirs}'s")
    low, high = fits.interval(by_S)
    slope = np.polyfit(np.log10(x_Q), theirs_QS.mean(axis=1), 1)[0]
    if slope < 0 and (high < 0 or low > 0):
        sentence += f" {theirs}'s line has the same loss at {10 ** (by_S.mean() / slope):.2f} times the x."
    curves = {ours: fits.fit("log_line", x_P, ours_PS), theirs: fits.fit("log_line", x_Q, theirs_QS)}
    if missed := [series for series, curve in curves.items() if curve and not curve.is_followed]:
        sentence += f" But the points of {' and '.join(missed)} do not follow a line: so lie the lines, not the losses."
    return [sentence]


def _between_valleys(study: Study, groups: dict[str, list[Point]], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the later series' lowest points lie elsewhere than the first one's."""
    curves = {}
    for series, group in groups.items():
        x_P, (_, loss_PS) = np.array([point.x for point in group]), complete(group, rows)
        if loss_PS.size and (curve := fits.fit("valley", x_P, loss_PS)):
            curves[series] = curve
    first, *others = curves or [""]
    return [
        f"{other}'s lowest point against {first}'s: {fits.moved(curves[other], curves[first], study.x_label)}"
        for other in others
    ]


def losses_table(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> list[str]:
    losses, has_x = losses_by_seed(rows), study.shape != "differences"
    header = ["point", *([study.x_label] if has_x else []), "seeds", "validation loss", "against the baseline"]
    lines = ["| " + " | ".join([*header, "bits per byte"]) + " |", "|---" * (len(header) + 1) + "|"]
    for group in by_series(points).values():
        baseline = losses.get(study.baseline_of(group).name, {})
        for point in group:
            ours = losses.get(point.name, {})
            by = [loss - baseline[seed] for seed, loss in ours.items() if seed in baseline]
            bits = [row[BITS] for row in rows if row["point"] == point.name]
            cells = [point.name, *([f"{point.x:,.10g}"] if has_x else []), str(len(ours))]
            lines.append("| " + " | ".join([*cells, *map(_spread, (list(ours.values()), by, bits))]) + " |")
    return [*lines, "", "Mean ± standard deviation over seeds; differences are paired by seed."]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def budget_table(study: Study, points: Sequence[Point]) -> list[str]:
    """The costs, which `Study.at` has proved equal but for what the study or a point varies."""
    has_x = study.shape != "differences"
    header = ["point", *([study.x_label] if has_x else []), "experts", "memory rows", TOTAL, ACTIVE, FLOPS, TOKENS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for point in points:
        costs, model = quantities(point.config), point.config.model
        x = [f"{point.x:,.10g}"] if has_x else []
        counts = [model.moe.n_routed_experts, sum(num_rows(model).values()), *costs.values()]
        lines.append("| " + " | ".join([point.name, *x, *(f"{count:,.0f}" for count in counts)]) + " |")
    return lines


def budget_notes(study: Study, points: Sequence[Point]) -> list[str]:
    """By how much the points that may differ from the others do."""
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
