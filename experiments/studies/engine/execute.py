"""Trains the runs that a study still lacks. Each is an ordinary run's folder; several processes may share a study.

DIR/plan.json           the points' settings, which every later start must agree with
DIR/runs/POINT-seedN    the runs
DIR/claims/             one file per run, locked by the process that trains the run
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError, RunConfig, differences, from_dict, replace, to_dict
from engram_jax.errors import FINISHED
from engram_jax.files import write_text
from engram_jax.version import __version__
from experiments.studies.engine.declared import Point
from experiments.studies.engine.finished_runs import free_to_change

Train = Callable[[RunConfig, Path], int]
"""Trains a run in a folder, from its last checkpoint if there is one; returns its exit status (errors.py)."""


def run_dir(study_dir: Path, point: Point, seed: int) -> Path:
    return study_dir / "runs" / f"{point.name}-seed{seed}"


def is_finished(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def has_plan(study_dir: Path) -> bool:
    return (study_dir / "plan.json").exists()


def agree_on_plan(study_dir: Path, name: str, points: Sequence[Point], write: bool = True) -> None:
    """Writes plan.json, or compares the points with it. A later start may have more points and more seeds.

    Args:
      write: False only compares.

    Raises:
      ConfigError: the folder holds a study with other settings or of another version, or something else.
    """
    ours = {"study": name, "version": __version__, "points": [_described(point) for point in points]}
    path = study_dir / "plan.json"
    if not has_plan(study_dir):
        if _is_other(study_dir) and not path.exists():  # looked for again: another process may have begun meanwhile
            raise ConfigError(
                f"{study_dir} is not a study's folder: it has files and no plan.json. Give another --out."
            )
        if not write:
            raise ConfigError(f"{study_dir} has no plan.json: nothing of this study was trained here.")
        try:
            study_dir.mkdir(parents=True, exist_ok=True)
            _begin(path, ours)
        except OSError as error:
            raise ConfigError(f"{study_dir} cannot be written ({error}): give another --out.") from None
    try:
        saved = json.loads(path.read_text())
        changed = _changes(ours, saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give another --out.") from None
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{study_dir} holds a study with other settings ({'; '.join(changed[:4])}{more}). Give this study its own "
            "--out, or give it the settings that the folder has."
        )
    if write and len(ours["points"]) > len(saved["points"]):
        write_text(path, _spelt(ours))


def _is_other(study_dir: Path) -> bool:
    """Whether the folder holds anything but a plan and its temporary files."""
    return study_dir.is_dir() and any(not entry.name.startswith("plan.json") for entry in study_dir.iterdir())


def _begin(path: Path, plan: dict[str, Any]) -> None:
    """Writes the plan under another name and links it: of two processes that start at once, the first one's stays."""
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        own.write_text(_spelt(plan))
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
    finally:
        own.unlink(missing_ok=True)


def _spelt(plan: dict[str, Any]) -> str:
    return json.dumps(plan, indent=2) + "\n"


def _described(point: Point) -> dict[str, Any]:
    return {"name": point.name, "x": point.x, "config": to_dict(point.config)}


def _changes(ours: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    lines = [f"{key}: {ours[key]} here, {saved[key]} there" for key in ("study", "version") if ours[key] != saved[key]]
    here, there = ({point["name"]: point for point in plan["points"]} for plan in (ours, saved))
    if not set(there) <= set(here):
        return [*lines, f"points: {', '.join(here)} here, {', '.join(there)} there"]
    for name in there:
        a, b = (from_dict(RunConfig, points[name]["config"]) for points in (here, there))
        lines += [f"{name}: {line}" for line in _differences(a, b)]
    return lines


def _differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    return [line for line in differences(ours, theirs) if not line.startswith(free_to_change())]


def check_finished(folder: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if a finished run is not the one that the study asks for."""
    try:
        saved = from_dict(RunConfig, json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder}/config.json cannot be read ({error}): restore it, or delete the folder to train the run again."
        ) from None
    # A run's own config also holds what its tokenizer made of it.
    size = saved.model.engram.engram_compressed_vocab_size
    if changed := _differences(replace(config, model__engram__engram_compressed_vocab_size=size), saved):
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): give the study these settings, or "
            "another --out."
        )


@contextlib.contextmanager
def claimed(study_dir: Path, folder: Path) -> Iterator[bool]:
    """Whether this process may train the run. No other process may, until the block or this process ends.

    This is not the run's own lock: a process that finds that one taken waits and then fails, while a study goes on to
    the next run.
    """
    path = study_dir / "claims" / f"{folder.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True


def execute(
    study_dir: Path,
    points: Sequence[Point],
    seeds: int,
    train: Train,
    log: Callable[[str], None],
    known: Container[tuple[str, int]] = (),
) -> int:
    """Trains every run that is not finished, not known, and not claimed by another process; seed by seed.

    Args:
      known: runs that were finished elsewhere, by point and seed.

    Returns:
      FINISHED, or the exit status of a run that was stopped.

    Raises:
      ConfigError: a finished run has other settings.
      ConfigError, RunError: those of a run that fails.
    """
    runs = [
        (point.seeded(seed), run_dir(study_dir, point, seed))
        for seed in range(seeds)
        for point in points
        if (point.name, seed) not in known
    ]
    for config, folder in runs:
        if is_finished(folder):
            check_finished(folder, config)
    for number, (config, folder) in enumerate(runs, start=1):
        if is_finished(folder):
            continue
        with claimed(study_dir, folder) as is_ours:
            if not is_ours:
                log(f"{folder.name} is being trained by another process.")
            elif not is_finished(folder):  # it may have been finished since
                log(f"--- run {number} of {len(runs)}: {folder.name}")
                if status := train(config, folder):
                    return status
    return FINISHED
