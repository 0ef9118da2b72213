"""The findings of a study in words: one sentence kind for each kind of finding, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from engram_jax.evaluation.over_seeds import LEVEL, OverSeeds
from experiments.studies.engine.differences import Comparison, Differences
from experiments.studies.engine.findings import (
    Best,
    Difference,
    Finding,
    Line,
    LinesApart,
    LowestMoved,
    NotFitted,
    Unfinished,
    Valley,
)

NEEDS = {
    "a whole seed": "No seed has all its points yet, so nothing is compared.",
    "two seeds": "No curve is fitted: that takes two seeds, since the spread of one is unknown.",
    "more points": "No curve is fitted: that takes more points.",
}


def sentences(finding: Finding) -> list[str]:
    """What the finding says."""
    match finding:
        case Unfinished():
            return [f"NOT finished: {finding.missing} of {finding.runs} runs are missing."]
        case Differences():
            return _differences(finding)
        case NotFitted():
            return [_head(finding.series) + NEEDS[finding.lacks]]
        case Valley():
            return [_head(finding.series) + _valley(finding) + _misfit(finding)]
        case Line():
            return [_head(finding.series) + _line(finding) + _misfit(finding)]
        case Best():
            return [_head(finding.series) + _best(finding)]
        case LowestMoved():
            return [_moved(finding)]
        case LinesApart():
            return [_apart(finding)]


def difference(found: Difference) -> str:
    """`a against b: -0.3100 nats per token (seed by seed ...; 95 % interval ...): more than the spread over seeds.`"""
    judged = {
        "unknown": "with one seed the spread over seeds is unknown",
        "within": "not more than the spread over seeds",
        "more": "more than the spread over seeds",
    }
    return f"{_measured(found.ours, found.theirs, found.by)}: {judged[found.spread]}."


def _measured(ours: str, theirs: str, by: OverSeeds) -> str:
    """The difference and its interval, without a verdict."""
    listed = ", ".join(f"{value:+.4f}" for value in by.values)
    head = f"{ours} against {theirs}: {by.mean:+.4f} nats per token (seed by seed {listed}"
    return f"{head})" if (found := by.interval()) is None else f"{head}; {_interval(*found, '+.4f')})"


def _interval(low: float, high: float, form: str) -> str:
    return f"{LEVEL} % interval {low:{form}} to {high:{form}}"


def _head(series: str) -> str:
    return f"{series}: " if series else ""


def _misfit(curve: Valley | Line) -> str:
    if curve.is_followed:
        return ""
    return (
        " But the points do not follow the curve: they miss it by more than the spread over seeds "
        f"(p = {curve.p_misfit:.2g}). So this says where the curve lies, not where the losses lie."
    )


def _valley(found: Valley) -> str:
    interval = _interval(found.low, found.high, ".1f")
    if found.is_found:
        return f"The fitted parabola is lowest at {found.lowest:.1f} ({interval}), on the axis of {found.x_label!r}."
    return (
        "Where the loss is lowest is not found: the fitted parabola's lowest point has the "
        f"{interval}, which reaches past the points, {found.first:g} to {found.last:g}."
    )


def _line(found: Line) -> str:
    numbers = f"{found.slope:+.4f} nats per decade ({_interval(found.low, found.high, '+.4f')})"
    if not found.is_found:
        return f"The fitted line's slope is not more than the spread: {numbers}."
    return f"The loss {'falls' if found.slope < 0 else 'rises'} along the fitted line by {numbers}."


def _best(found: Best) -> str:
    if found.difference is None:
        return f"No point is better than {found.baseline}, the baseline."
    chosen = f"It is the best of {found.points} points by the same losses, which makes it look better than it is."
    return f"{difference(found.difference)} {chosen}"


def _moved(found: LowestMoved) -> str:
    head = f"{found.ours}'s lowest point against {found.theirs}'s:"
    if found.lacks:
        return f"{head} not compared. That takes {found.lacks}, for both."
    judged = "more than the spread" if found.is_found else "not more than the spread"
    interval = _interval(found.low, found.high, "+.1f")
    return f"{head} {found.by:+.1f} ({interval}) on the axis of {found.x_label!r}: {judged}."


def _apart(found: LinesApart) -> str:
    if found.difference is None:
        return f"{found.ours} and {found.theirs} have no x in common, so their lines are not compared."
    lines = Difference(f"{found.ours}'s line at x = {found.x:,.0f}", f"{found.theirs}'s", found.difference.by)
    text = difference(lines)
    if found.times is not None:
        text += f" {found.theirs}'s line has the same loss at {found.times:.2f} times the x."
    if found.missed:
        names = " and ".join(found.missed)
        text += f" But the points of {names} do not follow a line: the lines lie so, not the losses."
    return text


def _differences(found: Differences) -> list[str]:
    if not found.comparisons:
        return [f"Nothing is compared: no seed has both {found.baseline} and another point finished."]
    number = len(found.comparisons)
    compared = "1 point is" if number == 1 else f"{number} points are"
    summary = f"{compared} compared with {found.baseline}. More than the spread: {_sides(found.found('more'))}."
    alike = found.found("more if all points scatter alike")
    if any(alike.values()):
        summary += f" If all points scatter alike, also: {_sides(alike)}."
    return [summary, *(_comparison(each, found.baseline, number) for each in found.comparisons)]


def _sides(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(names)} {side}" for side, names in found.items() if names) or "none"


def _comparison(each: Comparison, baseline: str, number: int) -> str:
    paper = "" if each.paper is None else f" (The paper: {each.paper:+.4f}.)"
    return f"{_measured(each.name, baseline, each.by)}: {_judged(each, number)}.{paper}"


def _judged(each: Comparison, number: int) -> str:
    among = f"among {number} comparisons" if number > 1 else "over seeds"
    own, pooled = f"p = {each.p_own:.2g}", f"p = {each.p_pooled:.2g}"
    match each.spread:
        case "unknown":
            return "with one seed its spread is unknown"
        case "more":
            return f"more than the spread {among} ({own})"
        case "within":
            together = "" if math.isnan(each.p_pooled) else f"; by the scatter of all points {pooled}"
            return f"not more than the spread {among} ({own}{together})"
        case _:
            return f"more than the spread {among} if all points scatter alike ({pooled}; by its own scatter {own})"
