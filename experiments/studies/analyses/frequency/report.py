"""The report of `frequency`: the verdict as values, its sentences, the tables, and the lines of results.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engram_jax.analysis.groups import minus
from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.markdown import bullets, table
from experiments.studies.analyses.frequency.measure import HELD_OUT, SHARE, UNREAD, Measured
from experiments.studies.analyses.raw_numbers import described, error_note, over_seeds, spread_name
from experiments.studies.analyses.trained_runs import DIFFERENCE
from experiments.studies.trained.pair import ENGRAM, MOE

ORDER = 3
"""Of the n-grams in files that do not say it."""

# --- the verdict ---


@dataclass(frozen=True)
class Gain:
    """Where memory lowers the loss on one text, by bucket of n-gram frequency."""

    text: str
    lower: tuple[str, ...]
    """Buckets in which the loss is lower with memory, by more than the spread."""
    higher: tuple[str, ...]
    best: str
    at_best: OverSeeds
    """Nats per token, with memory minus the twin."""


@dataclass(frozen=True)
class Memorised:
    """By how much more memory lowers the loss on the training text than on another text, at equal frequencies."""

    other: str
    by: OverSeeds
    """Nats per token."""


@dataclass(frozen=True)
class Trend:
    """A quantity after the rarest and after the most frequent n-grams of the held-out text."""

    layer: str
    rare: str
    at_rare: OverSeeds
    frequent: str
    at_frequent: OverSeeds

    @property
    def change(self) -> OverSeeds:
        return minus(self.at_frequent, self.at_rare)


@dataclass(frozen=True)
class Verdict:
    gains: tuple[Gain, ...]
    """The held-out text first."""
    memorised: tuple[Memorised, ...]
    gates: tuple[Trend, ...]
    """One for each layer; none where the text has one bucket."""
    age: Trend | None
    """Of the first layer's rows, in steps."""


def verdict(measured: Measured) -> Verdict:
    gains = []
    for text in reversed(list(measured.numbers)):
        by = measured.numbers[text][DIFFERENCE]
        sure = {label: one.mean for label, one in by.items() if one.differs_from()}
        best = min(by, key=lambda label: by[label].mean)
        gains.append(
            Gain(
                text,
                tuple(label for label, mean in sure.items() if mean < 0),
                tuple(label for label, mean in sure.items() if mean > 0),
                best,
                by[best],
            )
        )
    memorised = (Memorised(other, measured.overall(measured.gap(DIFFERENCE, other))) for other in measured.others)
    gates = (_trend(measured, "gate", layer) for layer in measured.layers)
    return Verdict(
        tuple(gains),
        tuple(memorised),
        tuple(trend for trend in gates if trend),
        _trend(measured, "age", measured.layers[0]),
    )


def _trend(measured: Measured, kind: str, layer: str) -> Trend | None:
    by = measured.numbers[HELD_OUT].get(f"{kind} {layer}", {})
    if len(by) < 2:
        return None
    (rare, at_rare), *_, (frequent, at_frequent) = by.items()
    return Trend(layer, rare, at_rare, frequent, at_frequent)


def sentences(found: Verdict, seeds: Sequence[int]) -> list[str]:
    """The verdict in words."""
    lines, beyond = [], spread_name(seeds)
    for gain in found.gains:
        said = f"On {_called(gain.text)} memory nowhere lowers the loss by {beyond}"
        if gain.lower:
            where = f"where the n-gram occurs {', '.join(gain.lower)} times elsewhere"
            said = f"On {_called(gain.text)} memory lowers the loss by {beyond} {where}"
        if gain.higher:
            said += f"; it raises the loss where the n-gram occurs {', '.join(gain.higher)} times"
        lines.append(f"{said}. The most: {gain.at_best.text()} nats per token at {gain.best} times.")
    for one in found.memorised:
        size = f"{one.by.text()} nats per token at equal frequencies"
        if not one.by.differs_from():
            lines.append(
                f"Against {_called(one.other)}, memory is not found to memorise more than its twin does: {size}."
            )
        else:
            side, who = ("more", "the model with memory") if one.by.mean > 0 else ("less", "its twin")
            lines.append(
                f"Memory is worth {side} on the training text than on {_called(one.other)}, by {size}: "
                f"{who} memorises more."
            )
    for trend in found.gates:
        lines.append(
            f"Layer {trend.layer}'s gates are {trend.at_rare.mean:.3f} after n-grams seen {trend.rare} times and "
            f"{trend.at_frequent.mean:.3f} after those seen {trend.frequent} times ({trend.change.text()})."
        )
    if age := found.age:
        lines.append(
            f"Rows of n-grams seen {age.rare} times were updated {age.at_rare.mean:.1f} steps ago on average, those of "
            f"n-grams seen {age.frequent} times {age.at_frequent.mean:.1f} steps ago (layer {age.layer})."
        )
    return lines


def _called(text: str) -> str:
    return text if text == UNREAD else f"the {text}"


# --- the report ---


def report(measured: Measured) -> list[str]:
    """The lines of report.md."""
    lines = ["## Verdict", "", *bullets(sentences(verdict(measured), measured.seeds))]
    for text, quantities in measured.numbers.items():
        lines += ["", f"## {text.capitalize()}", "", *_table(measured, quantities)]
    ngram = f"{measured.order}-gram"
    lines += [
        "",
        f"Nats per token, by how often the {ngram} just read occurs elsewhere in the text that the run has read. "
        f"{error_note(measured.seeds)} Gates: mean over streams. Age: steps since the rows of that {ngram} were last "
        "updated. Uses: updates of the rows, by this n-gram or another that shares a row. Both are means over heads.",
        "",
        "## What was memorised",
        "",
        "By how much the loss is lower on the training text than on another text, at equal frequency.",
    ]
    for other in measured.others:
        gaps = [measured.gap(quantity, other) for quantity in (MOE, ENGRAM, DIFFERENCE)]
        body = [[label, *(gap[label].text() for gap in gaps)] for label in gaps[0]]
        body.append(["all, held-out shares", *(measured.overall(gap).text() for gap in gaps)])
        lines += ["", f"Than on {_called(other)}:", "", *table([f"{ngram} elsewhere", MOE, ENGRAM, "by memory"], body)]
    return lines


def _table(measured: Measured, quantities: Mapping[str, Mapping[str, OverSeeds]]) -> list[str]:
    forms = {"gate": ".3f", "age": ".1f", "uses": ".1f"}
    memory = [(f"{kind} {layer}", form) for kind, form in forms.items() for layer in measured.layers]
    memory = [(name, form) for name, form in memory if name in quantities]
    header = [f"{measured.order}-gram elsewhere", SHARE, MOE, ENGRAM, DIFFERENCE, *(name for name, _ in memory)]
    body = []
    for label, by in quantities[DIFFERENCE].items():
        cells = [label, f"{quantities[SHARE][label].mean:.1%}"]
        cells += [f"{quantities[name][label].mean:.3f}" for name in (MOE, ENGRAM)] + [by.text()]
        for name, form in memory:
            cells.append(f"{quantities[name][label].mean:{form}}" if label in quantities[name] else "-")
        body.append(cells)
    return table(header, body)


# --- results.jsonl ---


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A row for every text, quantity and bucket."""
    for text, quantities in measured.numbers.items():
        for quantity, by_bucket in quantities.items():
            for label, by in by_bucket.items():
                about = {"text": text, "occurrences": label, "quantity": quantity, "order": measured.order}
                yield about | described(by) | {"by_seed": dict(zip(measured.seeds, by.values, strict=True))}


def from_rows(lines: Sequence[Mapping[str, Any]]) -> Measured:
    """The numbers that `rows` wrote."""
    numbers: dict[str, dict[str, dict[str, OverSeeds]]] = {}
    for row in lines:
        of_text = numbers.setdefault(row["text"], {})
        of_text.setdefault(row["quantity"], {})[row["occurrences"]] = over_seeds(row)
    quantities = dict.fromkeys(name for of_text in numbers.values() for name in of_text)
    for of_text in numbers.values():
        for name in quantities:
            of_text.setdefault(name, {})  # a quantity without any bucket has no row
    layers = tuple(name.removeprefix("gate ") for name in quantities if name.startswith("gate "))
    return Measured(tuple(map(int, lines[0]["by_seed"])), layers, int(lines[0].get("order", ORDER)), numbers)
