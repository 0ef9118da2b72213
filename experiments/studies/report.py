"""A study's report: results.jsonl (raw numbers), report.md (budget, losses, verdict) and study.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.counts import num_rows
from engram_jax.training.errors import RunError
from experiments.studies import fits
from experiments.studies.declared import ACTIVE, FLOPS, TOKENS, TOTAL, Point, Study, quantities
from experiments.studies.execute import check_finished, is_finished, run_dir

LOSS, BITS = "validation_loss", "bits_per_byte"


def write_report(study: Study, points: Sequence[Point], seeds: int, study_dir: Path) -> str:
    """Writes the three files from what is finished, and returns report.md's text.

    Raises:
      ConfigError: a finished run has other settings than the study.
      RunError: nothing is finished, or runs saw different corpora.
    """
    from experiments.studies.picture import draw

    rows = results(points, seeds, study_dir)
    text = report(study, points, seeds, rows)
    write_text(study_dir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    draw(study, points, rows, study_dir / "study.png")
    write_text(study_dir / "report.md", text)
    return text


def write_text(path: Path, text: str) -> None:
    """Atomic."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def results(points: Sequence[Point], seeds: int, study_dir: Path) -> list[dict[str, Any]]:
    """One line per finished run: its losses as result.json has them, and what it cost."""
    rows = []
    for point in points:
        for seed in range(seeds):
            folder = run_dir(study_dir, point, seed)
            if not is_finished(folder):
                continue
            check_finished(folder, point.seeded(seed))
            result = json.loads((folder / "result.json").read_text())
            costs = {name.replace(" ", "_"): number for name, number in quantities(point.config).items()}
            rows.append(
                {"point": point.name, "x": point.x, "seed": seed, LOSS: result["loss"], BITS: result[BITS], **costs}
                | {"buckets": result.get("buckets", {}), "corpus_sha256": result["corpus_sha256"]}
            )
    if not rows:
        raise RunError(f"{study_dir} has no finished run yet: train them with the same command, without --report_only.")
    corpora = {row["corpus_sha256"]: f"{row['point']}-seed{row['seed']}" for row in rows}
    if len(corpora) > 1:
        raise RunError(
            f"Runs of {study_dir} saw different corpora ({', '.join(corpora.values())} for instance): the text changed "
            "under the study. Restore it and delete the runs that saw the other, or start anew in another --out."
        )
    return rows


def report(study: Study, points: Sequence[Point], seeds: int, rows: Sequence[dict[str, Any]]) -> str:
    """report.md."""
    lines = [f"# {study.name}", "", study.question, "", "## Verdict", ""]
    lines += [f"- {sentence}" for sentence in verdict(study, points, seeds, rows)]
    lines += ["", "## Losses", "", *losses_table(study, points, rows)]
    lines += ["", "## Budget", "", *budget_table(study, points)]
    if study.caveats:
        lines += ["", "## What this cannot tell", "", *(f"- {caveat}" for caveat in study.caveats)]
    return "\n".join(lines) + "\n"


def complete(points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """The seeds for which every point is finished, and their losses [P, S]."""
    losses = {(row["point"], row["seed"]): row[LOSS] for row in rows}
    seeds = sorted({seed for _, seed in losses if all((p.name, seed) in losses for p in points)})
    return seeds, np.array([[losses[p.name, seed] for seed in seeds] for p in points], float)


def verdict(study: Study, points: Sequence[Point], seeds: int, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers say, a sentence each."""
    sentences, missing = [], len(points) * seeds - len(rows)
    if missing:
        sentences.append(f"NOT finished: {missing} of {len(points) * seeds} runs are missing.")
    which, loss_PS = complete(points, rows)
    if not which:
        return [*sentences, "No seed has all its points yet, so nothing is compared."]
    x_P = np.array([point.x for point in points])
    curve = None if study.shape == "differences" else fits.fit(study.shape, x_P, loss_PS)
    if study.shape == "differences":
        pass
    elif curve is None:
        need = "two seeds" if len(which) < 2 else "more points"
        sentences.append(f"No curve is fitted: that takes {need}; with less, its spread is unknown.")
    else:
        sentences.append(fits.sentence(curve, x_P, study.x_label))
    names = [point.name for point in points]
    best = int(loss_PS.mean(axis=1).argmin())
    baseline = names.index(study.baseline) if study.baseline in names else 0
    if best == baseline:
        sentences.append(f"No point is better than {names[baseline]}, the baseline.")
    else:
        sentences.append(
            fits.difference(loss_PS[best], loss_PS[baseline], names[best], names[baseline])
            + f" It is the best of {len(names)} points by the same losses, which flatters it."
        )
    return sentences


def losses_table(study: Study, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> list[str]:
    baseline = {row["seed"]: row[LOSS] for row in rows if row["point"] == (study.baseline or points[0].name)}
    lines = [f"| point | {study.x_label} | seeds | validation loss | against the baseline | bits per byte |"]
    lines.append("|---|---|---|---|---|---|")
    for point in points:
        ours = [row for row in rows if row["point"] == point.name]
        by = [row[LOSS] - baseline[row["seed"]] for row in ours if row["seed"] in baseline]
        cells = [point.name, f"{point.x:,.10g}", str(len(ours)), *map(_spread, ([r[LOSS] for r in ours], by))]
        lines.append("| " + " | ".join([*cells, _spread([r[BITS] for r in ours])]) + " |")
    return [*lines, "", "Mean ± standard deviation over seeds; differences are paired by seed."]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def budget_table(study: Study, points: Sequence[Point]) -> list[str]:
    """The costs, which `Study.at` has proved equal but for what the study varies."""
    header = [study.x_label, "experts", "memory rows", TOTAL, ACTIVE, FLOPS, TOKENS]
    lines = ["| point | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for point in points:
        costs = quantities(point.config)
        model = point.config.model
        counts = [model.moe.n_routed_experts, sum(num_rows(model).values()), *(costs[n] for n in header[3:])]
        lines.append(f"| {point.name} | {point.x:,.10g} | " + " | ".join(f"{count:,.0f}" for count in counts) + " |")
    return lines
