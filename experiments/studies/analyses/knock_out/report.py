"""The report of `knock_out`: the verdict as values, its sentences, the tables, and the lines of results.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.markdown import bullets, table
from experiments.studies.analyses.knock_out.measure import ALL, KIND, OFF, SEEN, TRAINED, TWIN, Measured
from experiments.studies.analyses.raw_numbers import described, error_note, number, over_seeds, spread_name

LEAST_SHARE = 0.005
"""Smallest share of the tokens for a kind to be named in the verdict."""
SHARED, NEEDED = 0.8, 1.25
"""Single layers' losses, as a share of the whole memory's: below the first they hold much of the same, above the second
they need each other."""


# --- the verdict ---


@dataclass(frozen=True)
class Layers:
    """What single layers cost when they are switched off, beside the whole memory."""

    single: Mapping[str, float]
    """By variant, nats per token."""
    together: float
    """The whole memory's cost."""

    @property
    def relation(self) -> Literal["hold much of the same", "add up", "need each other"]:
        total = sum(self.single.values())
        if total < SHARED * self.together:
            return "hold much of the same"
        return "need each other" if total > NEEDED * self.together else "add up"


@dataclass(frozen=True)
class Verdict:
    """Nats per token, but for what is retained."""

    cost: OverSeeds
    """The memory off, less as trained."""
    twin: OverSeeds
    """The twin, less the model as trained."""
    against_twin: OverSeeds
    """The memory off, less the twin."""
    by_kind: Mapping[str, OverSeeds]
    """The cost by kind of token, the greatest first."""
    not_worse_than_twin: tuple[str, ...]
    """Kinds of token on which the model without its memory is not shown to be worse than the twin."""
    by_seen: Mapping[str, OverSeeds]
    """The cost by occurrences of the n-gram before the token, the rarest first."""
    layers: Layers | None
    """None: one layer, or the whole memory costs nothing."""
    retained: float
    """Percent of the right predictions, over all tokens."""
    retained_by_kind: Mapping[str, float]


def verdict(measured: Measured) -> Verdict:
    (everything,) = measured.labels[ALL]
    cost_by, twin_by, against_by = (
        measured.differences[pair] for pair in ((OFF, TRAINED), (TWIN, TRAINED), (OFF, TWIN))
    )
    kinds = [label for label in measured.labels[KIND] if measured.share(label) > LEAST_SHARE and label in cost_by]
    cost = cost_by[everything]
    layers = {layer: measured.differences[layer, TRAINED][everything].mean for layer in measured.single_layers}
    return Verdict(
        cost=cost,
        twin=twin_by[everything],
        against_twin=against_by[everything],
        by_kind={label: cost_by[label] for label in sorted(kinds, key=lambda label: -cost_by[label].mean)},
        not_worse_than_twin=tuple(
            label for label in kinds if not (by := against_by[label]).differs_from() or by.mean < 0
        ),
        by_seen={label: cost_by[label] for label in measured.labels[SEEN] if label in cost_by},
        layers=Layers(layers, cost.mean) if layers and cost.differs_from() and cost.mean > 0 else None,
        retained=measured.retained[everything].mean,
        retained_by_kind={label: measured.retained[label].mean for label in kinds if label in measured.retained},
    )


def sentences(found: Verdict, seeds: Sequence[int]) -> list[str]:
    """The verdict in words."""
    beyond = spread_name(seeds)

    def judged(by: OverSeeds) -> str:
        return f"{by.text()} nats per token: {beyond}" if by.differs_from() else f"{by.text()}: not {beyond}"

    if found.against_twin.differs_from():
        side = "worse" if found.against_twin.mean > 0 else "better"
        against = f"Without its memory the model is {side} than its twin, by {judged(found.against_twin)}."
        if side == "worse":
            against += " The other parts have not learned what the memory held."
    else:
        against = (
            f"No difference is found between the model without its memory and its twin: {judged(found.against_twin)}."
        )
    lines = [
        f"Switching the memory off raises the loss by {judged(found.cost)}. "
        f"The twin without memory is above the model as trained by {judged(found.twin)}.",
        against,
    ]
    ranked = [f"{label} ({by.text()})" for label, by in found.by_kind.items()]
    lines.append(f"The memory is worth most on {', '.join(ranked[:2])}; least on {', '.join(ranked[:-3:-1])}.")
    lines.append(
        "The model without its memory is worse than the twin on every kind of token."
        if not found.not_worse_than_twin
        else f"The model without its memory is not shown to be worse than the twin on "
        f"{', '.join(found.not_worse_than_twin)}."
    )
    if len(found.by_seen) > 1:
        (rare, low), *_, (frequent, high) = found.by_seen.items()
        lines.append(f"After a {rare} the memory is worth {low.text()}, after a {frequent} {high.text()}.")
    if found.layers:
        listed = ", ".join(f"{layer} {by:+.3f}" for layer, by in found.layers.single.items())
        total = sum(found.layers.single.values())
        lines.append(
            f"The layers {found.layers.relation}: {listed}, together {total:+.3f}; all {found.layers.together:+.3f}."
        )
    share = found.retained_by_kind
    least, most = (f(share, key=share.__getitem__) for f in (min, max))
    lines.append(
        f"With the memory off, {found.retained:.0f} % as many next tokens are right: from {share[least]:.0f} % "
        f"({least}) to {share[most]:.0f} % ({most})."
    )
    return lines


# --- the report ---


def report(measured: Measured) -> list[str]:
    """The lines of report.md."""
    (everything,) = measured.labels[ALL]
    documents = "" if measured.documents is None else f" of {measured.documents:,} documents"
    layers = measured.single_layers
    pairs = [(OFF, TRAINED), *((layer, TRAINED) for layer in layers), (TWIN, TRAINED), (OFF, TWIN)]
    body = [
        [label, f"{measured.share(label):.1%}", f"{loss.mean:.3f}"]
        + [measured.differences[pair][label].text() for pair in pairs]
        for label, loss in measured.losses[TRAINED].items()
    ]
    header = ["predicted token", "share", TRAINED, f"{OFF}: more by", *(f"{layer}: more by" for layer in layers)]
    return [
        "## Verdict",
        "",
        *bullets(sentences(verdict(measured), measured.seeds)),
        "",
        "## Nats per token",
        "",
        f"{measured.tokens[everything]:,} held-out tokens{documents}. Differences are paired token by token. "
        f"{error_note(measured.seeds)}",
        "",
        *table([*header, f"{TWIN}: more by", f"{OFF} against {TWIN}"], body),
        "",
        "## Next tokens right",
        "",
        *_accuracies(measured),
    ]


def _accuracies(measured: Measured) -> list[str]:
    body = [
        [label, *(f"{100 * measured.right[v][label].mean:.1f} %" for v in (TWIN, TRAINED, OFF)), share.text(".1f")]
        for label, share in measured.retained.items()
    ]
    retained = paper_retained()
    least, most = min(retained, key=retained.__getitem__), max(retained, key=retained.__getitem__)
    return [
        *table(["predicted token", TWIN, TRAINED, OFF, "retained, %"], body),
        "",
        "Retained: next tokens right with the memory off, in percent of those right as trained. In the paper (figure "
        f"6) a 27B model retains from {retained[least]:.1f} % ({least}) to {retained[most]:.1f} % ({most}) of its "
        "benchmark scores.",
    ]


def paper_retained() -> dict[str, float]:
    """The paper's figure 6: percent of the score that remains with the memory off, by benchmark."""
    return json.loads((Path(__file__).parents[2] / "paper" / "knock_out_paper.json").read_text())["retained"]


# --- results.jsonl ---


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """By grouping: a row for every variant, group and seed; then the differences; then what is retained."""
    for grouping, labels in measured.labels.items():
        for variant, losses in measured.losses.items():
            for label in (label for label in labels if label in losses):
                about = {"grouping": grouping, "group": label, "variant": variant}
                right, tokens = measured.right[variant][label], measured.tokens[label]
                for seed, loss, accuracy in zip(measured.seeds, losses[label].values, right.values, strict=True):
                    yield about | {"seed": seed, "loss": loss, "accuracy": accuracy, "tokens": tokens}
        for (ours, theirs), differences in measured.differences.items():
            for label in (label for label in labels if label in differences):
                about = {"grouping": grouping, "group": label, "difference": f"{ours} - {theirs}"}
                yield about | described(differences[label])
        for label in (label for label in labels if label in measured.retained):
            about = {"grouping": grouping, "group": label, "retained": f"{OFF}, % of {TRAINED}"}
            yield about | described(measured.retained[label]) | {"documents": measured.documents}


def from_rows(lines: Sequence[Mapping[str, Any]]) -> Measured:
    """The numbers that `rows` wrote. Files of before 2026-12 lack `retained`: it is then known without its error."""
    of_runs = [row for row in lines if "variant" in row]
    seeds = tuple(dict.fromkeys(int(row["seed"]) for row in of_runs))
    labels: dict[str, tuple[str, ...]] = {}
    losses: dict[str, dict[str, OverSeeds]] = {}
    right: dict[str, dict[str, OverSeeds]] = {}
    for row in of_runs:
        known = labels.get(row["grouping"], ())
        labels[row["grouping"]] = known if row["group"] in known else (*known, row["group"])
        for into, name in ((losses, "loss"), (right, "accuracy")):
            values = into.setdefault(row["variant"], {}).get(row["group"], OverSeeds(())).values
            into[row["variant"]][row["group"]] = OverSeeds((*values, number(row[name])))
    differences: dict[tuple[str, str], dict[str, OverSeeds]] = {}
    for row in lines:
        if "difference" in row:
            ours, _, theirs = row["difference"].partition(" - ")
            differences.setdefault((ours, theirs), {})[row["group"]] = over_seeds(row)
    found = [row for row in lines if "retained" in row]
    retained = {row["group"]: over_seeds(row) for row in found} or {
        label: OverSeeds(tuple(100 * off / on for off, on in zip(right[OFF][label].values, by.values, strict=True)))
        for label, by in right[TRAINED].items()
        if all(by.values)
    }
    return Measured(
        seeds=seeds,
        labels=labels,
        tokens={row["group"]: int(row["tokens"]) for row in of_runs},
        documents=found[0]["documents"] if found else None,
        losses=losses,
        right=right,
        differences=differences,
        retained=retained,
    )
