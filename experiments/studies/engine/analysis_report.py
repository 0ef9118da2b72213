"""The report of a study that analyses trained runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engram_jax.config import ConfigError
from engram_jax.errors import RunError
from engram_jax.files import write_text
from engram_jax.markdown import bullets
from experiments.studies.engine.declared import FinishedRun, Point, Study
from experiments.studies.engine.execute import check_finished, is_finished, run_dir
from experiments.studies.engine.report import budget_table, caveats


def finished_runs(points: Sequence[Point], seeds: int, study_dir: Path) -> list[FinishedRun]:
    """The runs of all seeds that have every point finished, seed by seed.

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
    """Analyses the finished runs, writes report.md, and returns its text. Raises what `finished_runs` raises."""
    assert study.analysis is not None
    runs = finished_runs(points, seeds, study_dir)
    report_dir.mkdir(parents=True, exist_ok=True)
    lines = study.analysis.of_runs(runs, report_dir)
    return _write(study, points, [*lines, "", "## Runs", "", *bullets(str(run.folder) for run in runs)], report_dir)


def write_analysis_of_rows(study: Study, points: Sequence[Point], file: Path, report_dir: Path) -> str:
    """Reports on the raw numbers of an older analysis, without its runs; returns report.md's text.

    Raises:
      ConfigError: the file cannot be read, holds other rows, or the analysis needs the runs.
    """
    assert study.analysis is not None
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        report_dir.mkdir(parents=True, exist_ok=True)
        lines = study.analysis.of_rows(rows, report_dir)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ConfigError(f"--results {file}: not the raw numbers of {study.name} ({error!r}).") from None
    return _write(study, points, [*lines, "", "## Runs", "", f"From the raw numbers in {file}."], report_dir)


def _write(study: Study, points: Sequence[Point], lines: Sequence[str], report_dir: Path) -> str:
    lines = [f"# {study.name}", "", study.question, "", *lines, "", *budget_table(study, points), *caveats(study)]
    text = "\n".join(lines) + "\n"
    write_text(report_dir / "report.md", text)
    return text
