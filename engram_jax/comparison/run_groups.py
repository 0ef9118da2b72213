"""Finished and unfinished runs as their folders hold them, grouped by their settings, and what may be compared."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError, RunConfig, from_dict, replace, require
from engram_jax.data.ngram_frequency import bucket_names
from engram_jax.training.metrics import read_metrics

TEXT_FIELDS = ("corpus", "text_key", "max_documents", "holdout_fraction")
LOSS, BITS = "validation_loss", "bits_per_byte"


@dataclass(frozen=True)
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
        require(os.path.isdir(path), f"{path} is not a folder.")
        require(os.path.isfile(path / "config.json"), f"{path} is not a run: it has no config.json.")
        require(os.path.isfile(path / "tokenizer.json"), f"{path} has no tokenizer.json: copy the run's whole folder.")
        try:
            config = from_dict(RunConfig, json.loads((path / "config.json").read_text()))
            metrics = read_metrics(path)
            result_file = path / "result.json"
            result = json.loads(result_file.read_text()) if result_file.is_file() else None
        except ValueError as error:  # not JSON, or not a config
            raise ConfigError(f"{path} holds a file that cannot be read: {error}") from None
        require(bool(metrics), f"{path} has no metrics.jsonl, or an empty one: let the run reach its first line.")
        return cls(path, config, metrics, result, hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest())

    @property
    def seeds(self) -> tuple[int, int]:
        return self.config.train.seed, self.config.data.seed

    @property
    def corpus_sha256(self) -> str | None:
        return (self.result or {}).get("corpus_sha256")

    @property
    def step(self) -> int:
        return int(self.metrics[-1]["step"])

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.seq_len

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was written."""
        return [(int(line["step"]), line[metric]) for line in self.metrics if metric in line]

    def last(self, metric: str) -> float | None:
        series = self.series(metric)
        return series[-1][1] if series else None

    @property
    def tokens_per_second(self) -> float | None:
        # The median leaves out the first line, which holds the compilation.
        rates = [rate for _, rate in self.series("tokens_per_second")]
        return statistics.median(rates) if rates else None

    def bucket(self, name: str, what: str) -> float | None:
        """A bucket's `loss` or `share`; None if there is no such bucket."""
        return ((self.result or {}).get("buckets", {}).get(name) or {}).get(what)


@dataclass(frozen=True)
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

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        return [value for run in self.runs if (value := of(run)) is not None]

    def pairs(self, baseline: Group) -> list[tuple[Run, Run]]:
        """(ours, the baseline's) for each seed that both have."""
        theirs = {run.seeds: run for run in baseline.runs}
        return [(run, theirs[run.seeds]) for run in self.runs if run.seeds in theirs]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, each with a label of its own."""
    by_settings: dict[Any, list[Run]] = {}
    for run in runs:
        settings = replace(run.config, train__seed=0, data__seed=0)
        key = (settings, run.tokenizer_sha256, run.corpus_sha256) if run.result is not None else run.path.resolve()
        members = by_settings.setdefault(key, [])
        same = next((other.path for other in members if other.seeds == run.seeds), None)
        require(same is None, f"{same} and {run.path} are the same run, with equal settings and seeds: leave one out.")
        members.append(run)
    labels = [_label(members[0]) for members in by_settings.values()]
    return [
        Group(label if labels.count(label) == 1 else f"{label} [{members[0].path}]", tuple(members))
        for label, members in zip(labels, by_settings.values(), strict=True)
    ]


def _label(run: Run) -> str:
    is_whole = run.result is not None
    return (
        run.config.name if is_whole else f"{run.config.name} (unfinished, step {run.step} of {run.config.train.steps})"
    )


def baseline_of(groups: Sequence[Group]) -> Group | None:
    return next((group for group in groups if group.finished), None)


def caveats(group: Group, baseline: Group) -> tuple[str | None, str]:
    """The finest metric in which the two may be compared (None: in none), and why not in a finer one."""
    ours, theirs = group.runs[0], baseline.runs[0]
    who = f"{group.label} and {baseline.label}"
    fields = TEXT_FIELDS
    if ours.corpus_sha256 and theirs.corpus_sha256:  # then it does not matter by which path it was reached
        fields = ("holdout_fraction",)
    differing = [
        f"data.{name}" for name in fields if getattr(ours.config.data, name) != getattr(theirs.config.data, name)
    ]
    if ours.corpus_sha256 != theirs.corpus_sha256:
        differing.append("corpus_sha256")
    if differing:
        reason = f"{who} read different text ({', '.join(differing)}): their losses are not comparable."
        return None, reason
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        reason = (
            f"{who} have different tokenizers: nats per token are not comparable; bits per byte are, of equal text."
        )
        return BITS, reason
    counts = [(run.result or {}).get("num_tokens", 0) for run in (ours, theirs)]
    if counts[0] != counts[1]:
        reason = f"{who} were evaluated on {counts[0]:,} and {counts[1]:,} tokens: their losses are not comparable."
        return None, reason
    return LOSS, ""


def may_compare(group: Group, baseline: Group, metric: str) -> bool:
    """Whether the group's metric may be set against the baseline's."""
    return group.finished and group is not baseline and caveats(group, baseline)[0] in (metric, LOSS)


def has_equal_buckets(group: Group, baseline: Group) -> bool:
    """Whether their losses by bucket may be compared: the same tokens fell into each."""
    ours, theirs = group.runs[0], baseline.runs[0]
    same = all(ours.bucket(name, "share") == theirs.bucket(name, "share") for name in bucket_names())
    return same and may_compare(group, baseline, LOSS)
