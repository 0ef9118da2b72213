"""Compares runs in one picture and one table:  python -m experiments.compare RUN_DIR RUN_DIR ... [--output DIR]

Runs with equal settings but for their seeds are one group, shown as mean and spread. The first finished group is the
baseline that the differences refer to. A run that is not finished is shown with what it has and compared with nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro

from engram_jax.config import ConfigError, RunConfig, differences, from_dict, replace, require
from engram_jax.counts import parameters
from engram_jax.evaluation.frequency import bucket_names
from engram_jax.training.metrics import read_metrics

TEXT_FIELDS = ("corpus", "text_key", "holdout_fraction", "max_documents")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares trained runs; writes compare.png and compare.md."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Runs' folders, as experiments.run wrote them. The first one is the baseline; seeds of one run form a group."""
    output: Path | None = None
    """Where picture and table go (default: the folder that holds the first run)."""


@dataclasses.dataclass(frozen=True)
class Run:
    path: Path
    config: RunConfig
    metrics: list[dict[str, float]]
    """The lines of metrics.jsonl, each with its step."""
    result: dict[str, Any] | None
    """result.json; None if the run did not reach its end."""
    tokenizer_sha256: str

    @classmethod
    def load(cls, path: Path) -> Run:
        """Raises `ConfigError` if a file is missing or not what a run writes."""
        require(path.is_dir(), f"{path} is not a folder.")
        require((path / "config.json").is_file(), f"{path} is not a run: it has no config.json.")
        require((path / "tokenizer.json").is_file(), f"{path} has no tokenizer.json: copy the run's whole folder.")
        try:
            config = from_dict(RunConfig, json.loads((path / "config.json").read_text()))
            metrics = read_metrics(path)
            result_file = path / "result.json"
            result = json.loads(result_file.read_text()) if result_file.is_file() else None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} holds a file that is not JSON ({error}): restore it.") from None
        require(bool(metrics), f"{path} has no metrics.jsonl, or an empty one: let the run reach its first line.")
        return cls(path, config, metrics, result, hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest())

    @property
    def seeds(self) -> tuple[int, int]:
        return self.config.train.seed, self.config.data.seed

    @property
    def step(self) -> int:
        return int(self.metrics[-1]["step"])

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.seq_len

    def last(self, metric: str) -> float | None:
        values = [line[metric] for line in self.metrics if metric in line]
        return values[-1] if values else None

    @property
    def tokens_per_second(self) -> float | None:
        # The median leaves out the first line, which holds the compilation.
        rates = [line["tokens_per_second"] for line in self.metrics if "tokens_per_second" in line]
        return statistics.median(rates) if rates else None

    def bucket(self, name: str, what: str) -> float | None:
        """A bucket's `loss` or `share`; None if there is no such bucket."""
        return ((self.result or {}).get("buckets", {}).get(name) or {}).get(what)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only; one run if it is unfinished."""

    label: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    @property
    def finished(self) -> bool:
        return self.runs[0].result is not None

    @cached_property
    def losses(self) -> list[float]:
        return self.values(lambda run: run.last("validation_loss"))

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        return [value for run in self.runs if (value := of(run)) is not None]

    def pairs(self, baseline: Group) -> list[tuple[Run, Run]]:
        """(ours, the baseline's) for each seed that both have."""
        theirs = {run.seeds: run for run in baseline.runs}
        return [(run, theirs[run.seeds]) for run in self.runs if run.seeds in theirs]


def compare(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Writes compare.png and compare.md to `output`, prints the table, returns the picture's path.

    Raises:
      ConfigError: a folder is no run, or a run is given twice.
    """
    from experiments.compare_picture import draw

    require(bool(run_dirs), "give the folders of the runs to compare.")
    groups = grouped([Run.load(path) for path in run_dirs])
    output = output or run_dirs[0].resolve().parent
    output.mkdir(parents=True, exist_ok=True)
    text = report(groups)
    print(text)
    (output / "compare.md").write_text(text, encoding="utf-8")
    draw(groups, baseline_of(groups), headlines(groups), output / "compare.png")
    return output / "compare.png"


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, each with a label of its own."""
    by_settings: dict[Any, list[Run]] = {}
    for run in runs:
        settings = replace(run.config, train__seed=0, data__seed=0)
        members = by_settings.setdefault(settings if run.result is not None else run.path.resolve(), [])
        for other in members:
            require(
                other.seeds != run.seeds or other.tokenizer_sha256 != run.tokenizer_sha256,
                f"{other.path} and {run.path} are the same run (equal settings and seeds): leave one out.",
            )
        members.append(run)
    names = [members[0].config.name for members in by_settings.values()]
    groups = []
    for members in by_settings.values():
        first = members[0]
        label = first.config.name if names.count(first.config.name) == 1 else f"{first.config.name} [{first.path.name}]"
        if first.result is None:
            label += f" (unfinished, step {first.step} of {first.config.train.steps})"
        groups.append(Group(label, tuple(members)))
    return groups


def baseline_of(groups: Sequence[Group]) -> Group | None:
    return next((group for group in groups if group.finished), None)


def others(groups: Sequence[Group]) -> list[Group]:
    """The finished groups that are compared with the baseline."""
    return [group for group in groups if group.finished and group is not baseline_of(groups)]
