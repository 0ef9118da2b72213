"""The report of `gates`: the verdict as values, its sentences, the table, and the lines of results.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.markdown import bullets, table
from experiments.studies.analyses.gates.measure import FREQUENCY, LAYER, MEAN, MEMORY, SPREAD, Measured
from experiments.studies.analyses.raw_numbers import error_note, spread_name

QUANTITIES = {
    FREQUENCY: "the frequency of the n-gram",
    LAYER: "what their layer saves on the next token",
    MEMORY: "what the model saves against its twin",
}

# --- the verdict ---


@dataclass(frozen=True)
class Relation:
    """How the gates of all layers and streams go with one quantity."""

    quantity: str
    gates: int
    wider: int
    """Gates that open wider with the quantity, by more than the spread."""
    narrower: int
    strongest: tuple[str, int] | None
    """Layer and stream of the strongest correlation; None: no gate varies."""
    correlation: OverSeeds | None
    """The strongest rank correlation."""


def verdict(measured: Measured) -> tuple[Relation, ...]:
    """One relation for each quantity."""
    found = []
    for name in QUANTITIES:
        by_branch = {branch: numbers[name] for branch, numbers in measured.correlations.items()}
        known = {branch: by for branch, by in by_branch.items() if not math.isnan(by.mean)}
        sure = [by.mean for by in known.values() if by.differs_from()]
        strongest = max(known, key=lambda branch: abs(known[branch].mean)) if known else None
        found.append(
            Relation(
                name,
                len(by_branch),
                sum(mean > 0 for mean in sure),
                sum(mean < 0 for mean in sure),
                strongest,
                known[strongest] if strongest else None,
            )
        )
    return tuple(found)


def sentences(found: Sequence[Relation], seeds: Sequence[int]) -> list[str]:
    """The verdict in words."""
    lines = []
    for one in found:
        what = QUANTITIES[one.quantity]
        if one.strongest is None or one.correlation is None:
            lines.append(f"No gate varies, so none goes with {what}.")
            continue
        layer, stream = one.strongest
        lines.append(
            f"With {what}, {one.wider} of {one.gates} gates open wider and {one.narrower} shut, by "
            f"{spread_name(seeds)}. The strongest is layer {layer}, stream {stream}: rank correlation "
            f"{one.correlation.text()}, {strength(one.correlation.mean)}."
        )
    return lines


def strength(correlation: float) -> str:
    """Cohen's words (1988): small from 0.1, medium from 0.3, large from 0.5."""
    size = abs(correlation)
    return "negligible" if size < 0.1 else "small" if size < 0.3 else "medium" if size < 0.5 else "large"


# --- the report ---


def report(measured: Measured) -> list[str]:
    """The lines of report.md."""
    header = ["layer", "stream", MEAN, SPREAD, FREQUENCY, LAYER, MEMORY]
    body = [
        [layer, str(stream), *(numbers[name].text(".3f" if name in (MEAN, SPREAD) else "+.3f") for name in header[2:])]
        for (layer, stream), numbers in measured.correlations.items()
    ]
    return [
        "## Verdict",
        "",
        *bullets(sentences(verdict(measured), measured.seeds)),
        "",
        "## Gates and what they go with",
        "",
        *table(header, body),
        "",
        f"Spearman's rank correlation, over {measured.num_tokens:,} held-out tokens, of the gate at a token with three "
        "quantities: how often the n-gram that ends there occurs in the training text; the nats that this layer saves "
        "on the next token (this layer's memory off, minus as trained); the nats by which the twin without memory is "
        f"worse there. {error_note(measured.seeds)}",
        "",
        "gates.html shows every gate over sentences and held-out lines, gates.png some of them.",
    ]


# --- results.jsonl ---


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A row for every layer, stream and quantity."""
    for (layer, stream), numbers in measured.correlations.items():
        for name, by in numbers.items():
            about = {"layer": int(layer), "stream": stream, "quantity": name}
            by_seed = dict(zip(measured.seeds, by.values, strict=True))
            yield about | {"mean": by.mean, "std_seeds": by.std, "by_seed": by_seed}
