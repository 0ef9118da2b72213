"""Runs a study, a set of runs of equal cost, and reports on it:  python -m experiments.study NAME [--field value ...]

  --list                 prints all studies, one line each
  NAME --help            every option, and every field that can be overridden
  NAME --print           prints the plan: the runs and the table of their equal costs; then stops
  NAME --scale small     another size than tiny
  NAME --seeds 5         how often each point is trained (default 3)
  NAME --points A B      trains only these points
  NAME --out DIR         folder for the study (default studies/): DIR/NAME/SCALE
  NAME --report_only     reports on the finished runs and trains nothing
  NAME --results FILE    raw numbers (a results.jsonl, also of another study); their runs are not trained again
  NAME --train.steps 50  overrides a field of the run that all points are made from

The same command again trains the missing runs. Several processes may run it at the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from engram_jax.commands.command_line import exit_status, field_paths, parsed
from engram_jax.config import RunConfig, require
from engram_jax.errors import FINISHED
from experiments.studies import STUDIES
from experiments.studies.engine.analysis_report import write_analysis, write_analysis_of_rows
from experiments.studies.engine.corpus import check_corpus
from experiments.studies.engine.declared import Point, Study, by_series
from experiments.studies.engine.execute import agree_on_plan, execute, has_plan, is_finished, run_dir
from experiments.studies.engine.finished_runs import FinishedRuns, runs_from_files
from experiments.studies.engine.report import budget_table, write_report

SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says of one study."""

    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")]
    scale: str = "tiny"
    """Size of the runs; --list prints the sizes of each study."""
    seeds: int | None = None
    """How often each point is trained, with the seeds 0, 1, ... Default: 3; with --report_only all finished seeds."""
    points: tuple[str, ...] = ()
    """Names of the points to train and report on; --print shows them. Default: all."""
    out: Path = Path("studies")
    """Folder for all studies; each has a folder in it, with one for each scale."""
    print: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the runs and their costs, and stop."""
    report_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Report on the finished runs, and train nothing."""
    results: tuple[Path, ...] = ()
    """Files of raw numbers, from another machine or study. A run whose settings they have counts as finished."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        for study in STUDIES.values():
            print(f"{study.name:16}{study.question} [{', '.join(study.scales)}]")
        return FINISHED
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nStudies: {', '.join(STUDIES)}")
        return FINISHED
    name, overrides = arguments[0], arguments[1:]
    require(not name.startswith("-"), f"the study's name comes first: NAME {' '.join(arguments)}")
    study = STUDIES[name]
    options = parse(study, overrides)
    require(options.seeds is None or options.seeds > 0, f"--seeds {options.seeds} must be 1 or more.")
    all_points = study.at(options.config)
    points = chosen(study, all_points, options.points)
    study_dir, report_dir = study.run_folder(options.out, options.scale), options.out / name / options.scale
    for file in options.results:
        require(
            file.resolve() not in ((folder / "results.jsonl").resolve() for folder in (study_dir, report_dir)),
            f"--results {file}: this study writes its own numbers there. Copy the file first.",
        )
    if study.analysis and options.results:
        require(
            options.report_only and len(options.results) == 1,
            f"--results: {name} reads one file, and only with --report_only. Without --results it analyses its runs.",
        )
        print(write_analysis_of_rows(study, points, options.results[0], report_dir))
        print(f"Report, raw numbers and pictures: {report_dir}")
        return FINISHED
    known = runs_from_files(options.results, points, options.seeds if options.seeds or options.report_only else SEEDS)
    seeds = options.seeds or (seeds_there(study_dir, points, known) if options.report_only else SEEDS)
    if options.print:
        print(_plan(study, points, seeds, study_dir, known))
        return FINISHED
    in_study = study.trained_in or name
    if options.report_only:
        agree_on_plan(study_dir, in_study, all_points, write=bool(known))
    else:
        if has_plan(study_dir):
            agree_on_plan(study_dir, in_study, all_points)
        print(_plan(study, points, seeds, study_dir, known), flush=True)
        check_corpus(points, seeds, study_dir, known, log)
        agree_on_plan(study_dir, in_study, all_points)  # not before: the plan would keep a mistyped corpus
        if status := execute(study_dir, points, seeds, train, log, known):
            return status  # whoever stopped the run does not want the next one either
    if study.analysis:
        print(write_analysis(study, points, seeds, study_dir, report_dir))
        print(f"Report, raw numbers and pictures: {report_dir}")
    else:
        print(write_report(study, points, seeds, study_dir, known))
        print(f"Report, raw numbers and picture: {study_dir}/report.md, results.jsonl, study.png")
    return FINISHED


def seeds_there(study_dir: Path, points: Sequence[Point], known: FinishedRuns) -> int:
    """The number of seeds, from 0, that includes every finished and every known run."""
    names = {point.name for point in points}
    runs = [folder.name.rpartition("-seed") for folder in (study_dir / "runs").glob("*-seed*") if is_finished(folder)]
    finished = {int(seed) for name, _, seed in runs if name in names and seed.isdecimal()}
    return 1 + max(finished | {seed for _, seed in known}, default=SEEDS - 1)


def chosen(study: Study, points: Sequence[Point], names: Sequence[str]) -> Sequence[Point]:
    """The points of those names, in the study's order; all points without names.

    Raises:
      ConfigError: there is no such point, or the baseline is left out.
    """
    if not names:
        return points
    require(not study.analysis, f"--points: {study.name} analyses all of its runs. Leave --points out.")
    known = [point.name for point in points]
    for name in names:
        require(name in known, f"--points {name}: {study.name} has no such point; it has {', '.join(known)}.")
    left = [point for point in points if point.name in names]
    for series, group in by_series(left).items():
        baseline = study.baseline_of(by_series(points)[series]).name
        require(
            study.baseline == "" or any(point.name == baseline for point in group),
            f"--points {' '.join(names)}: add {baseline}, which they are compared with.",
        )
    return left


def parse(study: Study, arguments: Sequence[str]) -> Options:
    """The options, with the scale's run as the overrides change it.

    Raises:
      ConfigError: there is no such scale or field, or a config refuses a value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--scale", default="tiny")
    scale = parser.parse_known_args(arguments)[0].scale
    require(scale in study.scales, f"--scale {scale}: {study.name} has no such size; it has {', '.join(study.scales)}.")
    return parsed(
        Options,
        arguments,
        f"python -m experiments.study {study.name}",
        lambda options: [*field_paths(options.config), *(f.name for f in dataclasses.fields(Options)[1:])],
        default=Options(study.scales[scale](), scale),
        description=study.question,
    )


def train(config: RunConfig, folder: Path) -> int:
    from engram_jax.commands.command_line import keep_compiled_programs
    from engram_jax.training import loop

    keep_compiled_programs(config)
    return loop.train(config, folder).status


def log(line: str) -> None:
    print(line, flush=True)


def _plan(study: Study, points: Sequence[Point], seeds: int, study_dir: Path, known: FinishedRuns) -> str:
    folders = [run_dir(study_dir, point, seed) for seed in range(seeds) for point in points]
    finished = sum(map(is_finished, folders))
    elsewhere = f" --results has {len(known)} of them." if known else ""
    lines = [f"# {study.name}: {study.question}", "", *budget_table(study, points), ""]
    lines += [f"{len(points)} points, {seeds} seeds: {len(folders)} runs, {finished} of them finished, in {study_dir}."]
    return "\n".join(lines) + elsewhere


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
