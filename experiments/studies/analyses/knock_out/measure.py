"""The study `knock_out`: what a trained model has left to its memory, by the kind of token it predicts.

The memory's rows are scaled to zero at evaluation (paper, section 6.3), in all its layers or in one of them.

Legend: N tokens asked for, S seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.analysis.groups import Grouping, OverSeeds, means, quotients
from engram_jax.analysis.lookups import with_memory
from engram_jax.analysis.segments import Segment, segments, spread_evenly
from engram_jax.analysis.token_classes import CLASSES, token_kinds
from engram_jax.data.ngram_frequency import BUCKETS, NgramCounts, bucket_names
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.knock_out.picture import draw
from experiments.studies.analyses.trained_runs import KIND, MOST_TOKENS, OFF, TRAINED, TWIN, Scores, table
from experiments.studies.engine.declared import FinishedRun

ORDER = 3  # of the n-grams that are counted, as in training's own evaluation
LEAST_SHARE = 0.005
"""Of the tokens, for a kind to be named in the verdict."""
ALL, PIECE, SEEN = "all tokens", "place in the word", "n-gram in training"


@dataclass(frozen=True)
class Measured:
    """All that the report is made of."""

    seeds: tuple[int, ...]
    document_N: np.ndarray
    groupings: tuple[Grouping, ...]
    scores: dict[str, list[Scores]]
    """By variant (TWIN, TRAINED, OFF, `layer 1 off`), one for each seed."""

    @property
    def single_layers(self) -> list[str]:
        return [variant for variant in self.scores if variant.startswith("layer ")]

    def losses(self, ours: str, theirs: str, grouping: Grouping) -> dict[str, OverSeeds]:
        """By group, what one variant loses more than another, token by token."""
        both = zip(self.scores[ours], self.scores[theirs], strict=True)
        return means([a.losses_N - b.losses_N for a, b in both], grouping, self.document_N)

    def retained(self, grouping: Grouping, variant: str = OFF) -> dict[str, OverSeeds]:
        """By group, next tokens right with the memory off, in percent of those right as trained."""
        off, on = ([100 * s.right_N for s in self.scores[variant]], [s.right_N for s in self.scores[TRAINED]])
        return quotients(off, on, grouping, self.document_N)


def analyse(runs: Sequence[FinishedRun], folder: Path) -> list[str]:
    """results.jsonl and knock_out.png in `folder`; the report's lines."""
    measured = measure(runs)
    trained_runs.write_rows(folder / "results.jsonl", rows(measured))
    draw(measured, paper()["retained"], folder / "knock_out.png")
    return report(measured)


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """Scores the held-out text with every run and every part of its memory off.

    Raises:
      RunError: runs with different texts, or that cannot be read.
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
    return Measured(tuple(seed for seed, *_ in pairs), trained_runs.documents_of(text), groupings, scores)


def variants(model: EvaluatedRun) -> Iterator[tuple[str, EvaluatedRun]]:
    """The run as it is, and with its memory off in part or whole."""
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
    """Every token asked for, by itself and by the n-gram read before it."""
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


# --- the report ---


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A line for every seed, variant and group; then one for every difference."""
    for grouping in measured.groupings:
        for variant, scores in measured.scores.items():
            losses, right = (
                means([s[i] for s in scores], grouping, measured.document_N) for i in range(len(Scores._fields))
            )
            for label in losses:
                tokens = int(grouping.of(label).sum())
                for s, seed in enumerate(measured.seeds):
                    numbers = {"loss": losses[label].values[s], "accuracy": right[label].values[s], "tokens": tokens}
                    yield {"grouping": grouping.name, "group": label, "variant": variant, "seed": seed} | numbers
        pairs = [(OFF, TRAINED), (TWIN, TRAINED), (OFF, TWIN), *((la, TRAINED) for la in measured.single_layers)]
        for ours, theirs in pairs:
            for label, by in measured.losses(ours, theirs, grouping).items():
                of = {"grouping": grouping.name, "group": label, "difference": f"{ours} - {theirs}"}
                yield of | {"mean": by.mean, "stderr_documents": by.stderr, "std_seeds": by.std, "by_seed": by.values}


def report(measured: Measured) -> list[str]:
    lines = ["## Verdict", "", *(f"- {sentence}" for sentence in verdict(measured)), "", "## Nats per token", ""]
    lines += [
        f"{len(measured.document_N):,} held-out tokens of {len(np.unique(measured.document_N)):,} documents. "
        f"Differences are paired token by token; {trained_runs.seeds_said(measured.seeds)}",
        "",
    ]
    layers = measured.single_layers
    header = ["predicted token", "share", TRAINED, f"{OFF}: more by", *(f"{la}: more by" for la in layers)]
    body = []
    for grouping in measured.groupings:
        trained = means([s.losses_N for s in measured.scores[TRAINED]], grouping, measured.document_N)
        columns = [measured.losses(v, TRAINED, grouping) for v in (OFF, *layers, TWIN)]
        columns.append(measured.losses(OFF, TWIN, grouping))
        for label, loss in trained.items():
            cells = [label, f"{grouping.of(label).mean():.1%}", f"{loss.mean:.3f}"]
            body.append([*cells, *(column[label].text() for column in columns)])
    lines += table([*header, f"{TWIN}: more by", f"{OFF} against {TWIN}"], body)
    lines += ["", "## Next tokens right", "", *_accuracies(measured)]
    return lines


def _accuracies(measured: Measured) -> list[str]:
    body = []
    for grouping in measured.groupings:
        retained = measured.retained(grouping)
        right = [
            means([100 * s.right_N for s in measured.scores[variant]], grouping, measured.document_N)
            for variant in (TWIN, TRAINED, OFF)
        ]
        for label, share in retained.items():
            body.append([label, *(f"{column[label].mean:.1f} %" for column in right), share.text(".1f")])
    lines = table(["predicted token", TWIN, TRAINED, OFF, "retained, %"], body)
    retained = paper()["retained"]
    least, most = min(retained, key=retained.__getitem__), max(retained, key=retained.__getitem__)
    return [
        *lines,
        "",
        f"Retained: right with the memory off, in percent of right as trained. In the paper (figure 6) its 27B model "
        f"retains from {retained[least]:.1f} % ({least}) to {retained[most]:.1f} % ({most}) of its benchmark scores.",
    ]


def verdict(measured: Measured) -> list[str]:
    """What the numbers say, a sentence each."""
    everything, kinds, _, seen = measured.groupings
    (cost,) = measured.losses(OFF, TRAINED, everything).values()
    (gain,) = measured.losses(TWIN, TRAINED, everything).values()
    (worse,) = measured.losses(OFF, TWIN, everything).values()
    found = f"With the memory off the loss is {cost.text()} nats per token higher{_doubt(cost)}"
    found += f" The twin without memory is {gain.text()} above the model as trained{_doubt(gain)}"
    sentences = [found]
    if worse.differs_from():
        says = "worse than the twin that never had one: what the memory held, the rest has not learned"
        says = says if worse.mean > 0 else "better than the twin that never had one"
        sentences.append(f"Without its memory the model is {says} ({worse.text()}).")
    else:
        sentences.append(f"Without its memory the model is as good as its twin, within the spread ({worse.text()}).")
    by_kind = measured.losses(OFF, TRAINED, kinds)
    by_kind = {label: by for label, by in by_kind.items() if kinds.of(label).mean() > LEAST_SHARE}
    ranked = sorted(by_kind, key=lambda label: -by_kind[label].mean)
    sentences.append(
        "Most is lost on "
        + ", ".join(f"{label} ({by_kind[label].text()})" for label in ranked[:2])
        + "; least on "
        + ", ".join(f"{label} ({by_kind[label].text()})" for label in ranked[:-3:-1])
        + "."
    )
    against_twin = measured.losses(OFF, TWIN, kinds)
    not_worse = [label for label in by_kind if not (by := against_twin[label]).differs_from() or by.mean < 0]
    sentences.append(
        "Against the twin, the model without its memory is worse on every kind of token."
        if not not_worse
        else f"Against the twin, the model without its memory is not shown to be worse on {', '.join(not_worse)}."
    )
    by_seen = measured.losses(OFF, TRAINED, seen)
    if len(by_seen) > 1:
        (rare, low), *_, (frequent, high) = by_seen.items()
        sentences.append(f"After a {rare} it costs {low.text()}, after a {frequent} {high.text()}.")
    if measured.single_layers and cost.differs_from() and cost.mean > 0:
        alone = [next(iter(measured.losses(la, TRAINED, everything).values())).mean for la in measured.single_layers]
        relation = "hold much of the same" if sum(alone) < 0.8 * cost.mean else "add up"
        relation = "need each other" if sum(alone) > 1.25 * cost.mean else relation
        listed = ", ".join(f"{la} {by:+.3f}" for la, by in zip(measured.single_layers, alone, strict=True))
        sentences.append(f"The layers {relation}: {listed}, together {sum(alone):+.3f} of {cost.mean:+.3f}.")
    (kept,) = measured.retained(everything).values()
    share = {label: by for label, by in measured.retained(kinds).items() if label in by_kind}
    least, most = (f(share, key=lambda label: share[label].mean) for f in (min, max))
    sentences.append(
        f"{kept.mean:.0f} % of the next tokens that were right stay right in number, from {share[least].mean:.0f} % "
        f"({least}) to {share[most].mean:.0f} % ({most})."
    )
    return sentences


def _doubt(by: OverSeeds) -> str:
    return "." if by.differs_from() else ", which the spread explains."


def paper() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[2] / "paper" / "knock_out_paper.json").read_text())
