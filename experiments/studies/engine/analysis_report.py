"""The report of a study that looks into trained runs, rather than at their losses alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engram_jax.errors import RunError
from experiments.studies.engine.declared import FinishedRun, Point, Study
from experiments.studies.engine.execute import check_finished, is_finished, run_dir
from experiments.studies.engine.files import write_text
from experiments.studies.engine.report import budget_table


def finished_runs(points: Sequence[Point], seeds: int, study_dir: Path) -> list[FinishedRun]:
    """Those that are done, seed by seed.

    Raises:
      ConfigError: one has other settings than the study.
      RunError: no seed has all its points, so there is nothing to compare.
    """
    found = []
    for seed in range(seeds):
        folders = {point: run_dir(study_dir, point, seed) for point in points}
        if not all(map(is_finished, folders.values())):
            continue
        for point, folder in folders.items():
            check_finished(folder, point.seeded(seed))
            found.append(FinishedRun(point.name, seed, folder))
    if not found:
        raise RunError(
            f"{study_dir} has no seed with all of its runs ({', '.join(point.name for point in points)}) finished: "
            "train them with the same command, without --report_only."
        )
    return found


def write_analysis(study: Study, points: Sequence[Point], seeds: int, study_dir: Path, report_dir: Path) -> str:
    """Has the study analyse what is finished, and returns report.md's text. Raises what `finished_runs` does."""
    assert study.analyse is not None
    runs = finished_runs(points, seeds, study_dir)
    report_dir.mkdir(parents=True, exist_ok=True)
    lines = [f"# {study.name}", "", study.question, "", *study.analyse(runs, report_dir)]
    lines += ["", "## Runs", "", *(f"- {run.folder}" for run in runs), "", *budget_table(study, points)]
    if study.caveats:
        lines += ["", "## What this cannot tell", "", *(f"- {caveat}" for caveat in study.caveats)]
    text = "\n".join(lines) + "\n"
    write_text(report_dir / "report.md", text)
    return text
