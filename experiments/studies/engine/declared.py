"""What a study is, and the proof that its runs cost the same, from their configs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engram_jax.config import ConfigError, RunConfig, replace, require, to_dict
from engram_jax.counts import flops_per_token, parameters

TOLERANCE = 0.01
"""Largest relative difference between two runs' totals, active parameters or FLOPs per token."""
TOTAL, ACTIVE, FLOPS, TOKENS = "total parameters", "active parameters", "FLOPs per token", "tokens"


@dataclass(frozen=True)
class Point:
    """One setting of what the study varies, trained once for every seed."""

    name: str
    """Of its runs' folders."""
    x: float
    config: RunConfig
    """Without a seed: `seeded` gives it one."""
    series: str = ""
    """Of the study's curves, the one it lies on. Each has its own fit, and its own proof of equal costs."""
    varies: tuple[str, ...] = ()
    """Quantities in which this one point may differ: those of a part that it goes without. Its report says by what."""

    def seeded(self, seed: int) -> RunConfig:
        """The run of that seed: weights and the order of the data. Equal seeds of two points see equal batches."""
        return replace(self.config, name=f"{self.name}-seed{seed}", train__seed=seed, data__seed=seed)


@dataclass(frozen=True)
class FinishedRun:
    point: str
    seed: int
    folder: Path


Analysis = Callable[[Sequence[FinishedRun], Path], list[str]]
"""Looks into finished runs (whole seeds: every point of each), writes raw numbers and pictures into the folder, and
returns what report.md says: verdict in words computed from the numbers, then tables."""


@dataclass(frozen=True)
class Study:
    name: str
    question: str
    x_label: str
    scales: Mapping[str, Callable[[], RunConfig]]
    """By `--scale`, the run that the points are made from, overrides applied."""
    points: Callable[[RunConfig], tuple[Point, ...]]
    shape: Literal["valley", "log_line", "differences"]
    """What is fitted to loss against x: a parabola with a lowest point, a line in log10(x), or nothing: then the
    points have no order, and each is compared with the baseline."""
    varies: tuple[str, ...] = ()
    """Quantities that need not be equal over the points: TOTAL where memory comes on top."""
    baseline: str = ""
    """The point that the others are compared with. Of a series, the point of that name after the series': `3C-rho100`;
    if there is none, its first."""
    paper: str = ""
    """File under data/ with the paper's numbers: `curves` of [x, loss], or for "differences" `losses` by point."""
    caveats: tuple[str, ...] = field(default=())
    analyse: Analysis | None = None
    """Of a study that looks into its runs; its report is what this makes of them."""
    trained_in: str = ""
    """Name of the study whose runs it looks into: trained in that one's folder, once for all that look."""

    def run_folder(self, out: Path, scale: str) -> Path:
        """Where its runs are."""
        return out / (self.trained_in or self.name) / scale

    def at(self, base: RunConfig) -> tuple[Point, ...]:
        """The points made from `base`, proved to cost the same.

        Raises:
          ConfigError: they do not, or `base` sets a seed, which belongs to the study.
        """
        for path, seed in {"train.seed": base.train.seed, "data.seed": base.data.seed}.items():
            require(seed == 0, f"{path}={seed}: a study numbers its seeds from 0; say how many with --seeds.")
        points = self.points(base)
        for group in by_series(points).values():
            prove(group, self.varies)
        same_data(points)
        return points

    def baseline_of(self, points: Sequence[Point]) -> Point:
        """Of one series' points, the one that the others are compared with."""
        names = {self.baseline, f"{points[0].series}-{self.baseline}"}
        return next((point for point in points if point.name in names), points[0])


def by_series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of every series, in their order."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.series, []).append(point)
    return groups


def quantities(config: RunConfig) -> dict[str, float]:
    """What has to be equal: counts and tokens of a run."""
    counts = parameters(config.model)
    return {
        TOTAL: counts.total,
        ACTIVE: counts.active,
        FLOPS: flops_per_token(config.model, config.data.seq_len),
        TOKENS: config.data.batch_size * config.data.seq_len * config.train.steps,
    }


def prove(points: Sequence[Point], varies: Sequence[str] = ()) -> None:
    """Any two runs cost the same, to TOLERANCE, but for what the study or a point declares to vary.

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
    """Raises `ConfigError` unless all see the same text in the same order."""
    first = points[0]
    for point in points[1:]:
        ours, theirs = to_dict(point.config.data), to_dict(first.config.data)
        for name in ours:
            if ours[name] != theirs[name]:
                raise ConfigError(
                    f"{point.name} has data.{name}={ours[name]!r} and {first.name} has {theirs[name]!r}: give all "
                    "points of a study the same data."
                )
