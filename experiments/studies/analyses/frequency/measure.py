"""The study `frequency`: what the memory is worth, how far its gates open and how old its rows are, by how often the
n-gram before a token occurs; on text that was trained on and on text that was not.

On the training text an n-gram's own occurrence is not counted: "0" is an n-gram that was read there and nowhere else.
So texts are compared at equal frequencies, and what the first is better by was memorised. A run of less than an epoch
has also left parts of its training documents unread: against them, what is not owed to knowing the document shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram_jax.analysis.groups import Grouping, OverSeeds, joined, means, minus
from engram_jax.analysis.lookups import Lookup, look_up
from engram_jax.analysis.segments import Segment, segments, spread_evenly, trained_windows
from engram_jax.config import RunConfig
from engram_jax.data.ngram_frequency import BUCKETS, MAX_TOKENS, NgramCounts, bucket_names
from engram_jax.evaluation.documents import OwnText
from engram_jax.runs.settings import read_config
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.frequency.picture import draw
from experiments.studies.analyses.trained_runs import DIFFERENCE, beyond_what, table
from experiments.studies.engine.declared import FinishedRun
from experiments.studies.trained.pair import ENGRAM, MOE

TRAINING, HELD_OUT = "training text", "held-out text"
UNREAD = "unread parts of training documents"
LEAST_WINDOWS = 8
"""Unread, for a text of their own."""
MOST_TOKENS = 60_000
"""Of each text, windows evenly spread."""


class Text(NamedTuple):
    segments: list[Segment]
    buckets: Grouping


@dataclass(frozen=True)
class Measured:
    seeds: tuple[int, ...]
    layers: tuple[str, ...]
    order: int
    """Of the n-grams that are counted: the longest that the memory knows."""
    numbers: dict[str, dict[str, dict[str, OverSeeds]]]
    """By text, quantity (MOE, ENGRAM, DIFFERENCE, `gate 1`, `age 1`, `uses 1`, `share`) and bucket."""

    @property
    def others(self) -> list[str]:
        """Texts that were not read."""
        return [text for text in self.numbers if text != TRAINING]

    def gap(self, quantity: str, other: str) -> dict[str, OverSeeds]:
        """By bucket, MOE's or ENGRAM's loss on another text above that on the training text; of DIFFERENCE, by how
        much memory lowers the loss more on the training text. Nats."""
        ours, theirs = (self.numbers[text][quantity] for text in (other, TRAINING))
        return {label: minus(ours[label], theirs[label]) for label in ours if label in theirs}

    def overall(self, by_bucket: dict[str, OverSeeds]) -> OverSeeds:
        """The mean over buckets with the held-out text's shares, so that both texts have equal frequencies."""
        held_out = self.numbers[HELD_OUT]["share"]
        by_bucket = {label: by for label, by in by_bucket.items() if label in held_out}
        if not by_bucket:
            return OverSeeds((float("nan"),) * len(self.seeds))
        shares = np.array([held_out[label].mean for label in by_bucket])
        shares = shares / shares.sum()
        values = shares @ np.array([by.values for by in by_bucket.values()])
        errors = [by.stderr for by in by_bucket.values()]
        # Buckets share documents: as if they erred together.
        stderr = None if None in errors else float(shares @ np.array(errors, float))
        return OverSeeds(tuple(map(float, values)), stderr)


def analyse(runs: Sequence[FinishedRun], folder: Path) -> list[str]:
    """results.jsonl and frequency.png in `folder`; the report's lines."""
    measured = measure(runs)
    trained_runs.write_rows(folder / "results.jsonl", rows(measured))
    draw(measured, folder / "frequency.png")
    return report(measured)


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """Scores both texts with every run, and looks the memory's rows up.

    Raises:
      RunError: runs with different texts, or that cannot be read.
    """
    trained_runs.check_same_text(runs)
    pairs = trained_runs.pairs(runs)
    by_seed: dict[str, list[dict[str, dict[str, OverSeeds]]]] = {}
    layers: tuple[str, ...] = ()
    order = 0
    for seed, moe_folder, engram_folder in pairs:
        model = trained_runs.load(engram_folder)
        engram = model.parts.config.model.engram
        layers, order = tuple(map(str, engram.engram_layer_ids)), engram.engram_max_ngram_size
        texts = all_texts(OwnText(model), read_config(engram_folder), model.step, order)
        values = {}
        for name, text in texts.items():
            trained_runs.log(f"frequency: seed {seed}, {ENGRAM}, {name}")
            losses = trained_runs.score(model, text.segments).losses_N
            lookups = look_up(model, [segment.ids for segment in text.segments])
            values[name] = {ENGRAM: losses} | _of_memory(lookups)
        del model  # one run's tables in memory at a time
        model = trained_runs.load(moe_folder)
        for name, text in texts.items():
            trained_runs.log(f"frequency: seed {seed}, {MOE}, {name}")
            values[name][MOE] = trained_runs.score(model, text.segments).losses_N
            by_seed.setdefault(name, []).append(summarised(values[name], text))
    return Measured(
        tuple(seed for seed, *_ in pairs),
        layers,
        order,
        {
            name: {quantity: joined([one[quantity] for one in seeds]) for quantity in seeds[0]}
            for name, seeds in by_seed.items()
        },
    )


def all_texts(own: OwnText, config: RunConfig, step: int, order: int) -> dict[str, Text]:
    """What a run has read and what not, each with the occurrences of its n-grams in all that was read."""
    train, validation = own.data.train, own.data.validation
    count, most = step * config.data.batch_size, MAX_TOKENS // train.seq_len
    read = trained_windows(train, config.data.seed, min(count, most))
    counts = NgramCounts.of_windows(np.stack([train[int(i)]["tokens"] for i in read]), order)
    unread = np.setdiff1d(np.arange(len(train) if count <= most else 0), read)
    sources = {TRAINING: (train, read), UNREAD: (train, unread), HELD_OUT: (validation, np.arange(len(validation)))}
    found = {}
    for name, (source, windows) in sources.items():
        if name != UNREAD or len(windows) >= LEAST_WINDOWS:
            pieces = segments(source, spread_evenly(windows, source.seq_len, MOST_TOKENS))
            found[name] = Text(pieces, in_buckets(pieces, counts, own=name == TRAINING))
    return found


def in_buckets(pieces: Sequence[Segment], counts: NgramCounts, own: bool) -> Grouping:
    """By occurrences of the n-gram just read, its own one left out; tokens that no whole n-gram precedes in none."""
    found = []
    for piece in pieces:
        seen = counts.lookup(piece.ids[None, :-1])[0] - own
        bucket = np.searchsorted([low for low, _ in BUCKETS], seen, side="right") - 1
        bucket[: counts.order - 1] = -1
        found.append(bucket)
    return Grouping("n-gram read elsewhere", tuple(bucket_names()), np.concatenate(found))


def _of_memory(lookups: Sequence[Lookup]) -> dict[str, np.ndarray]:
    """By quantity and layer: the gate (mean over streams), uses and age of the longest n-gram's rows."""
    values = {}
    for layer in lookups[0].gates:
        values[f"gate {layer}"] = np.concatenate([one.gates[layer].mean(axis=-1) for one in lookups])
        values[f"uses {layer}"] = np.concatenate([one.uses[layer][:, -1] for one in lookups])
        if lookups[0].ages:
            values[f"age {layer}"] = np.concatenate([one.ages[layer][:, -1] for one in lookups])
    return values


def summarised(values: dict[str, np.ndarray], text: Text) -> dict[str, dict[str, OverSeeds]]:
    """By quantity and bucket, one seed's means."""
    values = values | {DIFFERENCE: values[ENGRAM] - values[MOE]}
    document_N = trained_runs.documents_of(text.segments)
    found = {name: means([value_N], text.buckets, document_N) for name, value_N in values.items()}
    counted_N = text.buckets.group_N >= 0
    shares = {label: OverSeeds((float(text.buckets.of(label)[counted_N].mean()),)) for label in found[ENGRAM]}
    return found | {"share": shares}


# --- the report ---


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A line for every text, bucket and quantity."""
    for text, quantities in measured.numbers.items():
        for quantity, by_bucket in quantities.items():
            for label, by in by_bucket.items():
                of = {"text": text, "occurrences": label, "quantity": quantity}
                numbers = dict(zip(measured.seeds, by.values, strict=True))
                yield of | {"mean": by.mean, "stderr_documents": by.stderr, "std_seeds": by.std, "by_seed": numbers}


def report(measured: Measured) -> list[str]:
    lines = ["## Verdict", "", *(f"- {sentence}" for sentence in verdict(measured))]
    for text, quantities in measured.numbers.items():
        lines += ["", f"## {text.capitalize()}", "", *_table(measured, quantities)]
    said = trained_runs.seeds_said(measured.seeds)
    lines += [
        "",
        f"Nats per token by how often the {measured.order}-gram just read occurs elsewhere in what the run has read; "
        f"{said} Gates: mean over streams. Age: steps since the rows of that {measured.order}-gram were last updated, "
        "uses: updates that touched them, by this n-gram or any other that shares a row; means over heads.",
        "",
        "## What was memorised",
        "",
        "How much lower the loss is on the training text than on another, at equal frequency.",
    ]
    for other in measured.others:
        gaps = [measured.gap(quantity, other) for quantity in (MOE, ENGRAM, DIFFERENCE)]
        body = [[label, *(gap[label].text() for gap in gaps)] for label in gaps[0]]
        body.append(["all, held-out shares", *(measured.overall(gap).text() for gap in gaps)])
        header = [f"{measured.order}-gram elsewhere", MOE, ENGRAM, "by the memory"]
        lines += ["", f"Than on {_called(other)}:", "", *table(header, body)]
    return lines


def _table(measured: Measured, quantities: dict[str, dict[str, OverSeeds]]) -> list[str]:
    forms = {"gate": ".3f", "age": ".1f", "uses": ".1f"}
    memory = [(f"{kind} {layer}", form) for kind, form in forms.items() for layer in measured.layers]
    memory = [(name, form) for name, form in memory if name in quantities]
    header = [f"{measured.order}-gram elsewhere", "share", MOE, ENGRAM, DIFFERENCE, *(name for name, _ in memory)]
    body = []
    for label, by in quantities[DIFFERENCE].items():
        cells = [label, f"{quantities['share'][label].mean:.1%}"]
        cells += [f"{quantities[name][label].mean:.3f}" for name in (MOE, ENGRAM)] + [by.text()]
        for name, form in memory:
            cells.append(f"{quantities[name][label].mean:{form}}" if label in quantities[name] else "-")
        body.append(cells)
    return table(header, body)


def verdict(measured: Measured) -> list[str]:
    """What the numbers say, a sentence each."""
    sentences = []
    for text in reversed(measured.numbers):
        by = measured.numbers[text][DIFFERENCE]
        best = min(by, key=lambda label: by[label].mean)
        gains = [label for label, one in by.items() if one.differs_from() and one.mean < 0]
        losses = [label for label, one in by.items() if one.differs_from() and one.mean > 0]
        beyond = beyond_what(measured.seeds)
        said = f"On {_called(text)} memory gains {beyond} where the n-gram occurs {_listed(gains)} times"
        said += " elsewhere" + (f", and costs where it occurs {_listed(losses)} times" if losses else "")
        sentences.append(f"{said}; most at {best} ({by[best].text()} nats per token).")
    for other in measured.others:
        more = measured.overall(measured.gap(DIFFERENCE, other))
        size = f"{more.text()} nats per token at equal frequencies"
        if more.differs_from() and more.mean > 0:
            said = f"Memory is worth more on text it was trained on than on {_called(other)}, by {size}: it memorises"
            sentences.append(f"{said} more than its twin does.")
        elif more.differs_from():
            said = f"Memory is worth less on text it was trained on than on {_called(other)}, by {size}: its twin"
            sentences.append(f"{said} memorises more.")
        else:
            sentences.append(f"No memorisation beyond the twin's is found against {_called(other)}: {size}.")
    for layer in measured.layers:
        gates = measured.numbers[HELD_OUT][f"gate {layer}"]
        if len(gates) < 2:
            continue
        (rare, low), *_, (frequent, high) = gates.items()
        sentences.append(
            f"Layer {layer}'s gates are {low.mean:.3f} after n-grams seen {rare} times and {high.mean:.3f} after those "
            f"seen {frequent} times ({minus(high, low).text()})."
        )
    ages = measured.numbers[HELD_OUT].get(f"age {measured.layers[0]}")
    if ages and len(ages) > 1:
        (rare, old), *_, (frequent, young) = ages.items()
        sentences.append(
            f"Rows of n-grams seen {rare} times were updated {old.mean:.1f} steps ago on average, those of n-grams "
            f"seen {frequent} times {young.mean:.1f} (layer {measured.layers[0]})."
        )
    return sentences


def _called(text: str) -> str:
    return text if text == UNREAD else f"the {text}"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "no number of"
