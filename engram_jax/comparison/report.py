"""Compares runs in one picture and one table, compare.png and compare.md.

Runs that differ in nothing but their seeds are one group, shown as mean and spread. The first finished group is the
baseline. A run that is not finished is shown with the numbers it has, and is not compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engram_jax.comparison.run_groups import (
    BITS,
    LOSS,
    Group,
    Run,
    baseline_of,
    grouped,
    has_equal_buckets,
    may_compare,
)
from engram_jax.comparison.verdict import headline, seed_label, sentence, verdict
from engram_jax.config import ConfigError, differences, replace, require
from engram_jax.counts import parameters
from engram_jax.data.ngram_frequency import bucket_names
from engram_jax.files import write_text
from engram_jax.markdown import bullets, table

NAMES = {LOSS: "validation loss", BITS: "bits per byte"}


def compare(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Writes compare.png and compare.md to `output` and prints the table; returns the picture's path.

    Args:
      output: a folder; default: the one that holds the first run.

    Raises:
      RunError: a folder is not a run.
      ConfigError: a run's file is missing or damaged, a run is given twice, or `output` cannot be written.
    """
    from engram_jax.comparison.picture import draw

    require(bool(run_dirs), "give the folders of the runs to compare.")
    groups = grouped([Run.load(path) for path in run_dirs])
    output = output or run_dirs[0].resolve().parent
    text = report(groups)
    with _writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "compare.md", text)
    print(text)
    titles = [headline(verdict(*pair)) for pair in compared_pairs(groups)]
    with _writing_to(output):
        draw(groups, "\n".join(titles) or ", ".join(group.label for group in groups), output / "compare.png")
    return output / "compare.png"


@contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"picture and table cannot be written to {output}: {error.strerror or error}. "
            "Give --output a folder that you can write to."
        ) from None


def compared_pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """(group, baseline) for every finished group but the baseline."""
    baseline = baseline_of(groups)
    return [(group, baseline) for group in groups if baseline and group.finished and group is not baseline]


def report(groups: Sequence[Group]) -> str:
    """The comparison in Markdown: verdicts, counts and losses, losses by bucket, the single runs, the settings."""
    baseline = baseline_of(groups)
    compared = compared_pairs(groups)
    lines = ["# Comparison", ""]
    sentences = [sentence(verdict(*pair)) for pair in compared]
    lines += bullets(sentences or ["Nothing to compare: fewer than two finished groups."])
    lines += ["", *table(["", *[group.label for group in groups]], _facts(groups, baseline)), ""]
    if baseline:
        title = "loss where the last n-gram was seen in training"
        lines += [*table([title, *[g.label for g in groups if g.finished]], _buckets(groups, baseline)), ""]
    if any(len(group.runs) > 1 for group in groups):
        lines += [
            "Over seeds: mean ± standard deviation [lowest, highest] (minus the baseline's mean).",
            "",
        ]
    lines += table(["run", "seed", "step", "validation loss", "bits per byte", "tokens/s"], _runs(groups))
    for group, other in compared:
        here, there = (replace(g.config, name="", train__seed=0, data__seed=0) for g in (group, other))
        changed = [f"- `{line}`" for line in differences(here, there)]
        lines += ["", f"Settings of {group.label} (here) and {other.label} (there):", "", *(changed or ["- equal"])]
    return "\n".join(lines) + "\n"


def _facts(groups: Sequence[Group], baseline: Group | None) -> list[list[str]]:
    counts = [parameters(group.config.model) for group in groups]
    rows = [
        ["seeds", *[", ".join(seed_label(run.seeds) for run in group.runs) for group in groups]],
        ["parameters", *[f"{count.total:,}" for count in counts]],
        ["active per token", *[f"{count.active:,}" for count in counts]],
        ["in memory tables", *[f"{count.memory:,}" for count in counts]],
        ["steps", *[f"{group.runs[0].step:,}" for group in groups]],
        ["tokens", *[f"{group.runs[0].step * group.runs[0].tokens_per_step:,}" for group in groups]],
    ]
    for metric in NAMES:
        rows.append([NAMES[metric]])
        for group in groups:
            against = baseline if baseline and may_compare(group, baseline, metric) else None
            rows[-1].append(_cell(group, against, lambda run, metric=metric: run.last(metric)))
    speeds = [group.values(lambda run: run.tokens_per_second) for group in groups]
    return [*rows, ["tokens/s (median)", *[f"{statistics.mean(s):,.0f}" if s else "-" for s in speeds]]]


def _buckets(groups: Sequence[Group], baseline: Group) -> list[list[str]]:
    rows = []
    for name in bucket_names():
        rows.append([f"{name} times"])
        for group in groups:
            if group.finished:
                against = baseline if has_equal_buckets(group, baseline) else None
                share = group.runs[0].bucket(name, "share")
                losses = _cell(group, against, lambda run, name=name: run.bucket(name, "loss"))
                rows[-1].append(losses if share is None else f"{losses}, {share:.1%} of tokens")
    return rows


def _runs(groups: Sequence[Group]) -> list[list[str]]:
    return [
        [
            str(run.path),
            seed_label(run.seeds),
            f"{run.step} of {run.config.train.steps}",
            *["-" if (x := run.last(metric)) is None else f"{x:.4f}" for metric in NAMES],
            "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        ]
        for group in groups
        for run in group.runs
    ]


def _cell(group: Group, against: Group | None, of: Callable[[Run], float | None]) -> str:
    """`3.4120 ± 0.0080 [3.4031, 3.4190] (-0.1203)`: mean, standard deviation, range, difference from the baseline."""
    values = group.values(of)
    if not values:
        return "-"
    text = f"{statistics.mean(values):.4f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.4f} [{min(values):.4f}, {max(values):.4f}]"
    theirs = against.values(of) if against else []
    return text + (f" ({statistics.mean(values) - statistics.mean(theirs):+.4f})" if theirs else "")
