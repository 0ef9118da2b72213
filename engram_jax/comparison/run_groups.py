"""Runs as their folders hold them, finished or not; grouped by their settings; and in which metric they compare."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram_jax.config import ConfigError, RunConfig, replace, require
from engram_jax.data.ngram_frequency import bucket_names
from engram_jax.runs.settings import read_config
from engram_jax.training.metrics import read_metrics

TEXT_FIELDS = ("corpus", "text_key", "max_documents", "holdout_fraction")
"""Settings of the data that decide which text is read, where the text's own hash is not known."""
LOSS, BITS = "validation_loss", "bits_per_byte"
"""Metrics in which runs are compared."""


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    path: Path
    config: RunConfig
    metrics: list[dict[str, float]]
    """The lines of metrics.jsonl, each with its step."""
    result: dict[str, Any] | None
    """result.json; None if the run did not reach its end."""
    tokenizer_sha256: str

    @classmethod
    def load(cls, path: Path) -> Run:
        """Reads the folder.

        Raises:
          RunError: it is not a run's folder.
          ConfigError: a file is missing or cannot be read.
        """
        config = read_config(path)
        require((path / "tokenizer.json").is_file(), f"{path} has no tokenizer.json: copy the run's whole folder.")
        try:
            metrics = read_metrics(path)
            result_file = path / "result.json"
            result = json.loads(result_file.read_text()) if result_file.is_file() else None
        except ValueError as error:  # not JSON
            raise ConfigError(f"{path}: metrics.jsonl or result.json cannot be read: {error}.") from None
        require(bool(metrics), f"{path} has no metrics.jsonl, or an empty one: train the run to its first logged step.")
        return cls(path, config, metrics, result, hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest())

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the weights and of the data."""
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
        """(step, value) of every line that has the metric."""
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
        """A bucket's `loss` or `share`; None without that bucket."""
        return ((self.result or {}).get("buckets", {}).get(name) or {}).get(what)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds; an unfinished run is a group of its own."""

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
        """(our run, the baseline's run) for each seed that both have."""
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
        require(same is None, f"{same} and {run.path} have equal settings and seeds: leave one of them out.")
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
    """The first finished group."""
    return next((group for group in groups if group.finished), None)


@dataclass(frozen=True)
class Mismatch:
    """Why two groups are not compared in LOSS."""

    what: Literal["text", "tokenizer", "tokens"]
    details: tuple[str, ...] = ()
    """Settings that differ (text), or numbers of evaluated tokens (tokens)."""


def comparable_metric(group: Group, baseline: Group) -> tuple[str | None, Mismatch | None]:
    """The finest metric in which the two can be compared, LOSS, BITS or None; and why not in LOSS."""
    ours, theirs = group.runs[0], baseline.runs[0]
    fields = TEXT_FIELDS
    if ours.corpus_sha256 and theirs.corpus_sha256:  # then the path of the text does not matter
        fields = ("holdout_fraction",)
    differing = [
        f"data.{name}" for name in fields if getattr(ours.config.data, name) != getattr(theirs.config.data, name)
    ]
    if ours.corpus_sha256 != theirs.corpus_sha256:
        differing.append("corpus_sha256")
    if differing:
        return None, Mismatch("text", tuple(differing))
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        return BITS, Mismatch("tokenizer")
    counts = [(run.result or {}).get("num_tokens", 0) for run in (ours, theirs)]
    if counts[0] != counts[1]:
        return None, Mismatch("tokens", tuple(f"{count:,}" for count in counts))
    return LOSS, None


def may_compare(group: Group, baseline: Group, metric: str) -> bool:
    """Whether the group's metric can be compared with the baseline's."""
    return group.finished and group is not baseline and comparable_metric(group, baseline)[0] in (metric, LOSS)


def has_equal_buckets(group: Group, baseline: Group) -> bool:
    """Whether their losses by bucket can be compared: the same tokens are in each bucket."""
    ours, theirs = group.runs[0], baseline.runs[0]
    same = all(ours.bucket(name, "share") == theirs.bucket(name, "share") for name in bucket_names())
    return same and may_compare(group, baseline, LOSS)
