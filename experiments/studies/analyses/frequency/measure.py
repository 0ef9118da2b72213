"""What memory is worth, how far its gates open and how old its rows are, by the frequency of the n-gram before a token;
on text that the run was trained on and on text that it was not.

On the training text the token's own occurrence is not counted: "0" means that the n-gram was read there and nowhere
else. So texts are compared at equal frequencies, and what is better on the training text was memorised. A run of less
than an epoch leaves parts of its training documents unread. They show what the model knows about a document without
having read that part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engram_jax.analysis.groups import Grouping, joined, means, minus
from engram_jax.analysis.lookups import Lookup, look_up
from engram_jax.analysis.segments import Segment, segments, spread_evenly, trained_windows
from engram_jax.config import RunConfig
from engram_jax.data.ngram_frequency import BUCKETS, MAX_TOKENS, NgramCounts, bucket_names
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.over_seeds import OverSeeds
from engram_jax.runs.settings import read_config
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.trained_runs import DIFFERENCE
from experiments.studies.engine.declared import FinishedRun
from experiments.studies.trained.pair import ENGRAM, MOE

TRAINING, HELD_OUT = "training text", "held-out text"
UNREAD = "unread parts of training documents"
LEAST_WINDOWS = 8
"""Fewest unread windows that are reported as a text of their own."""
MOST_TOKENS = 60_000
"""Tokens of each text that are scored; of a longer text, windows evenly spread."""
SHARE = "share"
"""The quantity that is a bucket's share of the tokens."""


class Text(NamedTuple):
    segments: list[Segment]
    buckets: Grouping


@dataclass(frozen=True)
class Measured:
    seeds: tuple[int, ...]
    layers: tuple[str, ...]
    order: int
    """Of the n-grams that are counted: the longest that the memory reads."""
    numbers: Mapping[str, Mapping[str, dict[str, OverSeeds]]]
    """By text, quantity (MOE, ENGRAM, DIFFERENCE, `gate 1`, `age 1`, `uses 1`, SHARE) and bucket."""

    @property
    def others(self) -> list[str]:
        """Texts that the run did not read."""
        return [text for text in self.numbers if text != TRAINING]

    def gap(self, quantity: str, other: str) -> dict[str, OverSeeds]:
        """By bucket, a loss on another text minus that on the training text, in nats.

        Of DIFFERENCE: by how much more memory lowers the loss on the training text.
        """
        ours, theirs = (self.numbers[text][quantity] for text in (other, TRAINING))
        return {label: minus(ours[label], theirs[label]) for label in ours if label in theirs}

    def overall(self, by_bucket: Mapping[str, OverSeeds]) -> OverSeeds:
        """The mean over buckets with the held-out text's shares, so that both texts have equal frequencies."""
        held_out = self.numbers[HELD_OUT][SHARE]
        by_bucket = {label: by for label, by in by_bucket.items() if label in held_out}
        if not by_bucket:
            return OverSeeds((float("nan"),) * len(self.seeds))
        shares = np.array([held_out[label].mean for label in by_bucket])
        shares = shares / shares.sum()
        values = shares @ np.array([by.values for by in by_bucket.values()])
        errors = [by.stderr for by in by_bucket.values()]
        # Buckets share documents, so their errors are added as if they erred together.
        stderr = None if None in errors else float(shares @ np.array(errors, float))
        return OverSeeds(tuple(map(float, values)), stderr)


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """Scores both texts with every run, and looks the memory's rows up.

    Raises:
      RunError: the runs read different texts, or one cannot be read.
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
    """The text that a run has read and the texts that it has not; n-grams are counted in all that was read."""
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
    """Tokens by occurrences of the n-gram just read, minus its own one if `own`.

    Tokens that no whole n-gram precedes are in no bucket.
    """
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
    return found | {SHARE: shares}
