"""What a study is, and the proof from their configs alone that its runs cost the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from engram_jax.config import ConfigError, RunConfig, replace, require, to_dict
from engram_jax.counts import flops_per_token, parameters

TOLERANCE = 0.01
"""Largest relative difference between two runs' total parameters, active parameters or FLOPs per token."""
TOTAL, ACTIVE, FLOPS, TOKENS = "total parameters", "active parameters", "FLOPs per token", "tokens"


@dataclass(frozen=True)
class Point:
    """One setting of the quantity that a study varies; trained once for every seed."""

    name: str
    """Begins the names of its runs' folders."""
    x: float
    config: RunConfig
    """Without a seed: `seeded` gives it one."""
    series: str = ""
    """The curve on which the point lies. Every curve has its own fit and its own proof of equal costs."""
    varies: tuple[str, ...] = ()
    """Quantities in which this one point may differ from the others: those of a part that it lacks. The report says by
    how much it differs."""

    def seeded(self, seed: int) -> RunConfig:
        """The run of that seed, which sets the weights and the order of the data. Equal seeds see equal batches."""
        return replace(self.config, name=f"{self.name}-seed{seed}", train__seed=seed, data__seed=seed)


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a run that has reached its end."""

    point: str
    seed: int
    folder: Path


class Analysis(Protocol):
    """Looks into finished runs and reports on more than their losses (experiments/studies/analyses)."""

    def of_runs(self, runs: Sequence[FinishedRun], folder: Path) -> list[str]:
        """Writes results.jsonl and pictures to `folder`; returns the lines of the report, the verdict first.

        Args:
          runs: whole seeds, that is every point of each.
        """
        ...

    def of_rows(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
        """The same from the lines of an older results.jsonl.

        Raises:
          ConfigError: the analysis needs the runs.
          KeyError, ValueError, TypeError: the rows are not those of this analysis.
        """
        ...


@dataclass(frozen=True)
class Study:
    """A question, and the runs of equal cost that answer it."""

    name: str
    question: str
    x_label: str
    scales: Mapping[str, Callable[[], RunConfig]]
    """By `--scale`, the run that the points are made from; overrides change this run first."""
    points: Callable[[RunConfig], tuple[Point, ...]]
    shape: Literal["valley", "log_line", "differences"]
    """What is fitted to loss against x: a parabola with a lowest point, a line in log10(x), or nothing. Without a fit,
    the points have no order, and each is compared with the baseline."""
    varies: tuple[str, ...] = ()
    """Quantities that need not be equal over the points: TOTAL where memory comes on top."""
    baseline: str = ""
    """Name of the point that the others are compared with. In a series its name follows the series' (`3C-rho100`);
    where no point has that name, the first point is the baseline."""
    paper: str = ""
    """File in experiments/studies/paper with the paper's numbers: `curves` of [x, loss], or for "differences" `losses`
    by point."""
    caveats: tuple[str, ...] = field(default=())
    """What the study cannot tell; the report ends with it."""
    analysis: Analysis | None = None
    """Of a study that looks into finished runs: what it does with them."""
    trained_in: str = ""
    """Of a study that looks into finished runs: the study that trains them. Its folder holds them once for all."""

    def run_folder(self, out: Path, scale: str) -> Path:
        """The folder that holds its runs."""
        return out / (self.trained_in or self.name) / scale

    def at(self, base: RunConfig) -> tuple[Point, ...]:
        """The points made from `base`, proved to cost the same.

        Raises:
          ConfigError: they do not, or `base` sets a seed, which belongs to the study.
        """
        for path, seed in {"train.seed": base.train.seed, "data.seed": base.data.seed}.items():
            require(seed == 0, f"{path}={seed}: a study sets the seeds itself, from 0. Give their number with --seeds.")
        points = self.points(base)
        for group in by_series(points).values():
            prove(group, self.varies)
        same_data(points)
        return points

    def baseline_of(self, points: Sequence[Point]) -> Point:
        """The point of one series that its other points are compared with."""
        names = {self.baseline, f"{points[0].series}-{self.baseline}"}
        return next((point for point in points if point.name in names), points[0])


def by_series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of every series, in their order."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.series, []).append(point)
    return groups


def quantities(config: RunConfig) -> dict[str, float]:
    """The quantities that have to be equal: counts and tokens of a run."""
    counts = parameters(config.model)
    return {
        TOTAL: counts.total,
        ACTIVE: counts.active,
        FLOPS: flops_per_token(config.model, config.data.seq_len),
        TOKENS: config.data.batch_size * config.data.seq_len * config.train.steps,
    }


def prove(points: Sequence[Point], varies: Sequence[str] = ()) -> None:
    """Checks that any two runs cost the same to TOLERANCE, but for what the study or a point declares to vary.

    Raises:
      ConfigError: names the run, the quantity and both numbers.
    """
    require(len(points) > 1, "a study compares at least two points.")
    all_costs = {point.name: quantities(point.config) for point in points}
    for quantity in (TOTAL, ACTIVE, FLOPS, TOKENS):
        costs = {p.name: all_costs[p.name] for p in points if quantity not in (*varies, *p.varies)}
        if len(costs) < 2:
            continue
        least = min(costs, key=lambda name: costs[name][quantity])
        most = max(costs, key=lambda name: costs[name][quantity])
        low, high = costs[least][quantity], costs[most][quantity]
        allowed = 0 if quantity == TOKENS else TOLERANCE
        if high - low > allowed * low:
            raise ConfigError(
                f"{most} has {high:,.0f} {quantity} and {least} has {low:,.0f}: {high / low - 1:.1%} apart, and a "
                f"study allows {allowed:.0%}. Change both alike, or leave one of the two out."
            )
    same_data(points)


def same_data(points: Sequence[Point]) -> None:
    """Raises `ConfigError` unless all points see the same text in the same order."""
    first = points[0]
    for point in points[1:]:
        ours, theirs = to_dict(point.config.data), to_dict(first.config.data)
        for name in ours:
            if ours[name] != theirs[name]:
                raise ConfigError(
                    f"{point.name} has data.{name}={ours[name]!r} and {first.name} has {theirs[name]!r}: give all "
                    "points of a study the same data."
                )
