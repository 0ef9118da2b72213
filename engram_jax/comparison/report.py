"""Compares runs in one picture and one table, compare.png and compare.md.

Runs with equal settings but for their seeds are one group, shown as mean and spread. The first finished group is the
baseline that the differences refer to. A run that is not finished is shown with what it has and compared with nothing.
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
    caveats,
    grouped,
    has_equal_buckets,
    may_compare,
)
from engram_jax.config import ConfigError, differences, replace, require
from engram_jax.counts import parameters
from engram_jax.data.ngram_frequency import bucket_names

UNITS = {LOSS: "nats per token", BITS: "bits per byte"}
NAMES = {LOSS: "validation loss", BITS: "bits per byte"}


def compare(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Writes compare.png and compare.md to `output`, prints the table, returns the picture's path.

    Raises:
      ConfigError: a folder is no run, a run is given twice, or `output` cannot be written.
    """
    from engram_jax.comparison.picture import draw

    require(bool(run_dirs), "give the folders of the runs to compare.")
    groups = grouped([Run.load(path) for path in run_dirs])
    output = output or run_dirs[0].resolve().parent
    text = report(groups)
    with _writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / "compare.md").write_text(text, encoding="utf-8")
    print(text)
    titles = [headline(*pair) for pair in compared_pairs(groups)]
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
            "Give --output a folder that can be written."
        ) from None


def compared_pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Every finished group but the baseline, each with the baseline."""
    baseline = baseline_of(groups)
    return [(group, baseline) for group in groups if baseline and group.finished and group is not baseline]


def headline(group: Group, baseline: Group) -> str:
    """`engram_tiny is 0.1203 nats per token below moe_tiny (3.4120 against 3.5323)`."""
    metric, _ = caveats(group, baseline)
    if metric is None:
        return f"{group.label} and {baseline.label} are not comparable"
    ours, theirs = (statistics.mean(g.values(lambda run, metric=metric: run.last(metric))) for g in (group, baseline))
    by = f"{abs(ours - theirs):.4f} {UNITS[metric]} {'below' if ours < theirs else 'above'}"
    return f"{group.label} is {by} {baseline.label} ({ours:.4f} against {theirs:.4f})"


def verdict(group: Group, baseline: Group) -> str:
    """The headline, then what the seeds say about it."""
    metric, reason = caveats(group, baseline)
    if metric is None:
        return f"WARNING: {reason}"

    def of(run: Run) -> float | None:
        return run.last(metric)

    ours, theirs = group.values(of), baseline.values(of)
    sentences = [f"WARNING: {reason}"] if reason else []
    sentences += [headline(group, baseline) + "."]
    pairs = [(a.seeds, (of(a) or 0) - (of(b) or 0)) for a, b in group.pairs(baseline)]
    if len(pairs) > 1:
        listed = ", ".join(f"{difference:+.4f} (seed {_seed(seeds)})" for seeds, difference in pairs)
        mean, std = statistics.mean(d for _, d in pairs), statistics.stdev(d for _, d in pairs)
        sentences.append(f"Seed by seed: {listed}; mean {mean:+.4f}, standard deviation {std:.4f}.")
    if min(len(ours), len(theirs)) > 1:
        spread = max(max(values) - min(values) for values in (ours, theirs))
        is_more = abs(statistics.mean(ours) - statistics.mean(theirs)) > spread
        sentences.append(
            f"That is {'more' if is_more else 'NOT more'} than the spread over seeds "
            f"({spread:.4f} from the lowest to the highest)."
        )
    else:
        sentences.append("With one seed the spread over seeds is unknown.")
    return " ".join(sentences)


def report(groups: Sequence[Group]) -> str:
    """The comparison in Markdown: verdicts, counts and losses, losses by bucket, the single runs, the settings."""
    baseline = baseline_of(groups)
    compared = compared_pairs(groups)
    lines = ["# Comparison", ""]
    lines += [f"- {verdict(*pair)}" for pair in compared] or ["- Nothing to compare: fewer than two finished groups."]
    lines += ["", *_table(["", *[group.label for group in groups]], _facts(groups, baseline)), ""]
    if baseline:
        title = "loss where the last n-gram was seen in training"
        lines += [*_table([title, *[g.label for g in groups if g.finished]], _buckets(groups, baseline)), ""]
    lines += _table(["run", "seed", "step", "validation loss", "bits per byte", "tokens/s"], _runs(groups))
    for group, other in compared:
        here, there = (replace(g.config, name="", train__seed=0, data__seed=0) for g in (group, other))
        changed = [f"- `{line}`" for line in differences(here, there)]
        lines += ["", f"Settings of {group.label} (here) and {other.label} (there):", "", *(changed or ["- equal"])]
    return "\n".join(lines) + "\n"


def _facts(groups: Sequence[Group], baseline: Group | None) -> list[list[str]]:
    counts = [parameters(group.config.model) for group in groups]
    rows = [
        ["seeds", *[", ".join(_seed(run.seeds) for run in group.runs) for group in groups]],
        ["parameters", *[f"{count.total:,}" for count in counts]],
        ["active per token", *[f"{count.active:,}" for count in counts]],
        ["in memory tables", *[f"{count.memory:,}" for count in counts]],
        ["steps", *[f"{group.runs[0].step:,}" for group in groups]],
        ["tokens", *[f"{group.runs[0].step * group.runs[0].tokens_per_step:,}" for group in groups]],
    ]
    for metric in UNITS:
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
            _seed(run.seeds),
            f"{run.step} of {run.config.train.steps}",
            *["-" if (x := run.last(metric)) is None else f"{x:.4f}" for metric in UNITS],
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


def _seed(seeds: tuple[int, int]) -> str:
    """`1`, with the data's seed if that is neither the default nor the same."""
    train, data = seeds
    return str(train) if data in (0, train) else f"{train} (data {data})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up when it is printed."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [header, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
