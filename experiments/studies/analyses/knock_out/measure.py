"""Losses and right predictions with the memory on, off, and off in one layer; by groups of tokens.

The memory's rows are scaled to zero at evaluation (paper, section 6.3).

Legend: N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engram_jax.analysis.groups import Grouping, means, quotients
from engram_jax.analysis.lookups import with_memory
from engram_jax.analysis.segments import Segment, segments, spread_evenly
from engram_jax.analysis.token_classes import CLASSES, token_kinds
from engram_jax.data.ngram_frequency import BUCKETS, NgramCounts, bucket_names
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.evaluation.over_seeds import OverSeeds
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.trained_runs import Scores
from experiments.studies.engine.declared import FinishedRun

TWIN, TRAINED, OFF = "moe", "as trained", "memory off"
"""Variants: the twin without memory, the model with memory, and the same model with its memory switched off."""
ALL, KIND, PIECE, SEEN = "all tokens", "kind", "place in the word", "n-gram in training"
"""Groupings of tokens; KIND is that of engram_jax/analysis/token_classes.py."""
ORDER = 3
"""Of the n-grams that are counted, as in training's own evaluation."""
MOST_TOKENS = 400_000
"""Held-out tokens that are scored; of a longer text, windows evenly spread."""


@dataclass(frozen=True)
class Measured:
    """Numbers over seeds by the label of a group of tokens. Labels differ between groupings, too."""

    seeds: tuple[int, ...]
    labels: Mapping[str, tuple[str, ...]]
    """By grouping, the groups that have tokens."""
    tokens: Mapping[str, int]
    """By group, how many."""
    documents: int | None
    """Held-out documents; None where a results.jsonl does not say it."""
    losses: Mapping[str, Mapping[str, OverSeeds]]
    """By variant (TWIN, TRAINED, OFF, `layer 1 off`) and group: nats per token."""
    right: Mapping[str, Mapping[str, OverSeeds]]
    """By variant and group: share of next tokens that are right."""
    differences: Mapping[tuple[str, str], Mapping[str, OverSeeds]]
    """By two variants and group: how much more the first loses, paired token by token. Nats per token."""
    retained: Mapping[str, OverSeeds]
    """By group: next tokens that are right with the memory off, in percent of those that are right as trained."""

    @property
    def single_layers(self) -> list[str]:
        """The variants with one layer's memory off."""
        return [variant for variant in self.losses if variant.startswith("layer ")]

    def share(self, label: str) -> float:
        """The group's share of all tokens."""
        return self.tokens[label] / self.tokens[self.labels[ALL][0]]


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """Scores the held-out text with every run and with every part of its memory off.

    Raises:
      RunError: the runs read different texts, or one cannot be read.
    """
    trained_runs.check_same_text(runs)
    pairs, text, groupings = trained_runs.pairs(runs), None, ()
    scores: dict[str, list[Scores]] = {}
    for seed, *folders in pairs:
        for folder in folders:
            model = trained_runs.load(folder)
            if text is None:
                own = OwnText(model)
                text = held_out(own)
                groupings = group(model, own, text)
            for variant, scaled in variants(model):
                trained_runs.log(f"knock_out: seed {seed}, {variant}")
                scores.setdefault(variant, []).append(trained_runs.score(scaled, text))
    assert text is not None
    return summarised(tuple(seed for seed, *_ in pairs), scores, groupings, trained_runs.documents_of(text))


def summarised(
    seeds: tuple[int, ...],
    scores: Mapping[str, Sequence[Scores]],
    groupings: Sequence[Grouping],
    document_N: np.ndarray,
) -> Measured:
    """Scores (by variant, one for each seed) as numbers by group of tokens."""

    def by_group(values_SN: Sequence[np.ndarray]) -> dict[str, OverSeeds]:
        return _merged(means(values_SN, grouping, document_N) for grouping in groupings)

    right = {variant: [one.right_N for one in of_seeds] for variant, of_seeds in scores.items()}
    losses = {variant: [one.losses_N for one in of_seeds] for variant, of_seeds in scores.items()}
    layers = [variant for variant in scores if variant.startswith("layer ")]
    compared = [(OFF, TRAINED), (TWIN, TRAINED), (OFF, TWIN), *((layer, TRAINED) for layer in layers)]
    return Measured(
        seeds=seeds,
        labels={one.name: tuple(label for label in one.labels if one.of(label).any()) for one in groupings},
        tokens={label: int(one.of(label).sum()) for one in groupings for label in one.labels},
        documents=len(np.unique(document_N)),
        losses={variant: by_group(values_SN) for variant, values_SN in losses.items()},
        right={variant: by_group(values_SN) for variant, values_SN in right.items()},
        differences={
            (ours, theirs): by_group([a - b for a, b in zip(losses[ours], losses[theirs], strict=True)])
            for ours, theirs in compared
        },
        retained=_merged(
            quotients([100 * off_N for off_N in right[OFF]], right[TRAINED], grouping, document_N)
            for grouping in groupings
        ),
    )


def _merged(parts: Iterator[dict[str, OverSeeds]]) -> dict[str, OverSeeds]:
    return {label: by for part in parts for label, by in part.items()}


def variants(model: EvaluatedRun) -> Iterator[tuple[str, EvaluatedRun]]:
    """The run as it is, and with its memory off: all of it, then one layer at a time."""
    layers = model.parts.config.model.engram.engram_layer_ids
    yield (TRAINED if layers else TWIN), model
    if layers:
        yield OFF, with_memory(model, dict.fromkeys(layers, 0.0))
    for layer in layers if len(layers) > 1 else ():
        yield f"layer {layer} off", with_memory(model, {layer: 0.0})


def held_out(own: OwnText) -> list[Segment]:
    """The windows that training's own evaluation scores."""
    source = own.data.validation
    return segments(source, spread_evenly(np.arange(len(source)), source.seq_len, MOST_TOKENS))


def group(model: EvaluatedRun, own: OwnText, text: Sequence[Segment]) -> tuple[Grouping, ...]:
    """Every predicted token grouped by its kind, by its place in the word, and by the n-gram before it."""
    stream = own.data.validation.stream
    bounds = np.append(np.asarray(stream.starts), stream.num_tokens)
    kinds = {}
    for document in {segment.document for segment in text}:
        kinds[document] = token_kinds(model.tokenizer, stream.tokens[bounds[document] : bounds[document + 1]])
    asked = [(kinds[s.document], slice(s.start + 1, s.start + len(s.ids))) for s in text]
    classes_N = np.concatenate([kind.classes[places] for kind, places in asked]).astype(np.int64)
    continues_N = np.concatenate([kind.continues[places] for kind, places in asked])
    is_word_N = np.isin(classes_N, [CLASSES.index(name) for name in ("keyword", "identifier", "name", "word")])
    counts = NgramCounts.of(own.data.train.stream.tokens, ORDER)
    seen_N = np.concatenate([counts.lookup(s.ids[None, :-1])[0] for s in text])
    bucket_N = np.searchsorted([low for low, _ in BUCKETS], seen_N, side="right") - 1
    names = tuple(f"{ORDER}-gram seen {name} times" for name in bucket_names())
    return (
        Grouping(ALL, ("all",), np.zeros(len(classes_N), np.int64)),
        Grouping(KIND, CLASSES, classes_N),
        Grouping(PIECE, ("begins a word", "continues a word"), np.where(is_word_N, continues_N.astype(np.int64), -1)),
        Grouping(SEEN, names, bucket_N),
    )
