"""What a comparison of two groups of runs found, as values, and the sentences that say it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engram_jax.comparison.run_groups import BITS, LOSS, Group, Mismatch, Run, comparable_metric
from engram_jax.evaluation.over_seeds import LEVEL, OverSeeds

UNITS = {LOSS: "nats per token", BITS: "bits per byte"}
"""Units of the metrics in which runs are compared."""


@dataclass(frozen=True)
class Verdict:
    """A group of runs against the baseline."""

    ours: str
    theirs: str
    metric: str | None
    """LOSS or BITS, in which the two are compared; None: in no metric."""
    mismatch: Mismatch | None
    """Why they are not compared in LOSS."""
    our_mean: float = float("nan")
    their_mean: float = float("nan")
    """Means over all seeds of each group."""
    by_seed: Mapping[str, float] | None = None
    """The difference for each seed that both groups have."""

    @property
    def difference(self) -> float:
        """Ours minus theirs; below 0 is better."""
        return self.our_mean - self.their_mean

    @property
    def paired(self) -> OverSeeds | None:
        """The differences seed by seed; None without a seed in common."""
        return OverSeeds(tuple(self.by_seed.values())) if self.by_seed else None

    @property
    def spread(self) -> Literal["unknown", "within", "more"]:
        """Whether the paired difference is more than the spread over seeds; unknown below two seeds in common."""
        if self.paired is None or self.paired.interval() is None:
            return "unknown"
        return "more" if self.paired.differs_from() else "within"


def verdict(group: Group, baseline: Group) -> Verdict:
    """The group against the baseline, both finished."""
    metric, mismatch = comparable_metric(group, baseline)
    if metric is None:
        return Verdict(group.label, baseline.label, None, mismatch)

    def of(run: Run) -> float | None:
        return run.last(metric)

    by_seed = {seed_label(a.seeds): (of(a) or 0) - (of(b) or 0) for a, b in group.pairs(baseline)}
    ours, theirs = (statistics.mean(one.values(of)) for one in (group, baseline))
    return Verdict(group.label, baseline.label, metric, mismatch, ours, theirs, by_seed)


def seed_label(seeds: tuple[int, int]) -> str:
    """`1`, with the data's seed if that is neither the default nor the same."""
    train, data = seeds
    return str(train) if data in (0, train) else f"{train} (data {data})"


def headline(found: Verdict) -> str:
    """`engram_tiny is 0.1203 nats per token below moe_tiny (3.4120 against 3.5323)`."""
    if found.metric is None:
        return f"{found.ours} and {found.theirs} are not comparable"
    by = f"{abs(found.difference):.4f} {UNITS[found.metric]} {'below' if found.difference < 0 else 'above'}"
    return f"{found.ours} is {by} {found.theirs} ({found.our_mean:.4f} against {found.their_mean:.4f})"


def sentence(found: Verdict) -> str:
    """The headline, what the seeds say about it, and a warning where the two differ in more than settings."""
    warning = f"WARNING: {_mismatch(found)}" if found.mismatch else ""
    if found.metric is None:
        return warning
    return " ".join([*([warning] if warning else []), f"{headline(found)}.", _seeds(found)])


def _seeds(found: Verdict) -> str:
    paired, by_seed = found.paired, found.by_seed or {}
    if paired is None or (interval := paired.interval()) is None:
        return "The spread over seeds is unknown: that takes two seeds or more that both have."
    listed = ", ".join(f"{value:+.4f} (seed {seed})" for seed, value in by_seed.items())
    judged = "more" if found.spread == "more" else "NOT more"
    return (
        f"Seed by seed: {listed}; mean {paired.mean:+.4f}, {LEVEL} % interval {interval[0]:+.4f} to "
        f"{interval[1]:+.4f}. That is {judged} than the spread over seeds."
    )


def _mismatch(found: Verdict) -> str:
    assert found.mismatch is not None
    who, details = f"{found.ours} and {found.theirs}", found.mismatch.details
    match found.mismatch.what:
        case "text":
            return f"{who} read different text ({', '.join(details)}), so their losses are not comparable."
        case "tokenizer":
            return (
                f"{who} have different tokenizers. Nats per token are not comparable; bits per byte of equal text are."
            )
        case "tokens":
            return f"{who} were evaluated on {' and '.join(details)} tokens, so their losses are not comparable."
