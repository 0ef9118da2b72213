"""The study `gates`: where the memory's gates open, and what each of them goes with.

Legend: N tokens asked for, T tokens of a sentence, M residual streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engram_jax.analysis.gates import draw_gates
from engram_jax.analysis.gates_page import Sentence, page
from engram_jax.analysis.groups import Grouping, OverSeeds, joined, means, rank_correlation
from engram_jax.analysis.lookups import look_up, with_memory
from engram_jax.analysis.segments import Segment, segments, spread_evenly
from engram_jax.data.ngram_frequency import NgramCounts
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.trained_runs import beyond_what, table
from experiments.studies.engine.declared import FinishedRun
from experiments.studies.engine.files import write_text

MOST_TOKENS = 30_000
"""Of held-out text: its rank correlations have a standard error of about 0.006 by tokens."""
SENTENCES = (
    "By the way, the Milky Way is older than the Solar System.",
    "Diana, Princess of Wales, never met Alexander the Great.",
    "for i in range(len(self.items)):\n    print(i)\n",
    'if __name__ == "__main__":\n    unittest.main()\n',
)
LINES, SHORTEST, LONGEST = 6, 5, 30
"""Held-out lines that are shown, and their tokens."""
IN_PICTURE = 4
MEAN, SPREAD = "mean gate", "std over tokens"
FREQUENCY, LAYER, MEMORY = "n-gram's frequency", "saved by this layer", "saved against the twin"


@dataclass(frozen=True)
class Measured:
    seeds: tuple[int, ...]
    correlations: dict[tuple[str, int], dict[str, OverSeeds]]
    """By Engram layer and stream: mean gate, its standard deviation over tokens, and rank correlations with others."""
    sentences: tuple[Sentence, ...]
    """Of the first seed's run."""
    run: str
    num_tokens: int


def analyse(runs: Sequence[FinishedRun], folder: Path) -> list[str]:
    """results.jsonl, gates.html and gates.png in `folder`; the report's lines."""
    measured = measure(runs)
    trained_runs.write_rows(folder / "results.jsonl", rows(measured))
    write_text(folder / "gates.html", html(measured))
    trained_runs.save_figure(picture(measured.sentences), folder / "gates.png")
    return report(measured)


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """Gates and losses on held-out text with every run.

    Raises:
      RunError: runs with different texts, or that cannot be read.
    """
    trained_runs.check_same_text(runs)
    pairs = trained_runs.pairs(runs)
    by_seed: list[dict[tuple[str, int], dict[str, OverSeeds]]] = []
    sentences: tuple[Sentence, ...] = ()
    text: list[Segment] = []
    seen_N = np.zeros(0)
    for seed, moe_folder, engram_folder in pairs:
        trained_runs.log(f"gates: seed {seed}")
        model = trained_runs.load(engram_folder)
        engram = model.parts.config.model.engram
        layers = engram.engram_layer_ids
        if not text:
            own = OwnText(model)
            source = own.data.validation
            text = segments(source, spread_evenly(np.arange(len(source)), source.seq_len, MOST_TOKENS))
            counts = NgramCounts.of(own.data.train.stream.tokens, engram.engram_max_ngram_size)
            seen_N = np.concatenate([counts.lookup(piece.ids[None, :-1])[0] for piece in text]).astype(float)
        lookups = look_up(model, [piece.ids for piece in text])
        gates = {layer: np.concatenate([one.gates[layer] for one in lookups]) for layer in lookups[0].gates}
        trained_N, off_N = losses(model, text), losses(with_memory(model, dict.fromkeys(layers, 0.0)), text)
        saved = {FREQUENCY: seen_N}
        by_layer = {str(layer): off_N - trained_N for layer in layers}
        for layer in layers if len(layers) > 1 else ():
            by_layer[str(layer)] = losses(with_memory(model, {layer: 0.0}), text) - trained_N
        if not sentences:
            sentences = (*own_sentences(model), *telling_lines(model, text, gates, off_N - trained_N))
        del model  # one run's tables in memory at a time
        saved[MEMORY] = losses(trained_runs.load(moe_folder), text) - trained_N
        others = {layer: saved | {LAYER: by_N} for layer, by_N in by_layer.items()}
        by_seed.append(correlations(gates, others, trained_runs.documents_of(text)))
    seeds = tuple(seed for seed, *_ in pairs)
    over_seeds = {branch: joined([one[branch] for one in by_seed]) for branch in by_seed[0]}
    return Measured(seeds, over_seeds, sentences, pairs[0][2].name, sum(len(piece.ids) - 1 for piece in text))


def losses(model: EvaluatedRun, text: Sequence[Segment]) -> np.ndarray:
    return trained_runs.score(model, text).losses_N


def correlations(
    gates: Mapping[str, np.ndarray], others: Mapping[str, Mapping[str, np.ndarray]], document_N: np.ndarray
) -> dict[tuple[str, int], dict[str, OverSeeds]]:
    """By layer and stream of one run.

    Args:
      gates: by layer, [N, M].
      others: by layer, what its gates are correlated with: by name, [N].
    """
    whole = Grouping("", (MEAN,), np.zeros(len(document_N), np.int64))
    return {
        (layer, m): means([gate_N], whole, document_N)
        | {SPREAD: OverSeeds((float(gate_N.std()),))}
        | {name: rank_correlation(gate_N, other_N, document_N) for name, other_N in others[layer].items()}
        for layer, gate_NM in gates.items()
        for m, gate_N in enumerate(gate_NM.T)
    }


# --- sentences ---


def own_sentences(model: EvaluatedRun) -> list[Sentence]:
    """SENTENCES as documents, each with what the whole memory saves."""
    tokenizer, layers = model.tokenizer, model.parts.config.model.engram.engram_layer_ids
    documents = [np.array([tokenizer.bos_id, *tokenizer.encode(s), tokenizer.eos_id], np.int32) for s in SENTENCES]
    lookups, on = look_up(model, documents), model.score(documents)
    off = with_memory(model, dict.fromkeys(layers, 0.0)).score(documents)
    return [
        Sentence(
            text.strip(),
            [tokenizer.decode([i]) for i in ids[1:-1]],
            {layer: gate_TM[1:] for layer, gate_TM in lookup.gates.items()},
            (without.losses - with_it.losses)[1:],
        )
        for text, ids, lookup, with_it, without in zip(SENTENCES, documents, lookups, on, off, strict=True)
    ]


def telling_lines(
    model: EvaluatedRun, text: Sequence[Segment], gates: Mapping[str, np.ndarray], saved_N: np.ndarray
) -> list[Sentence]:
    """The held-out lines, one of each document, for which the memory saves most nats per token."""
    newline = np.array(["\n" in model.tokenizer.decode([i]) for i in range(model.tokenizer.vocab_size)])
    candidates, begin = [], 0
    for piece in text:
        read = piece.ids[:-1]
        ends = [*(np.flatnonzero(newline[read]) + 1).tolist(), len(read)]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            if SHORTEST <= end - start <= LONGEST:
                # The last token is left out: what follows it belongs to the next line.
                saving = float(saved_N[begin + start : begin + end - 1].mean())
                candidates.append((saving, piece.document, begin + start, begin + end, read[start:end]))
        begin += len(read)
    chosen, documents = [], set()
    for candidate in sorted(candidates, key=lambda c: -c[0]):
        if candidate[1] not in documents and len(chosen) < LINES:
            documents.add(candidate[1])
            chosen.append(candidate)
    return [
        Sentence(
            f"Held-out document {document}: the memory saves {saving:.2f} nats per token",
            [model.tokenizer.decode([i], skip_special_tokens=False) for i in ids.tolist()],
            {layer: gate_NM[start:end] for layer, gate_NM in gates.items()},
            saved_N[start:end],
        )
        for saving, document, start, end, ids in chosen
    ]


def html(measured: Measured) -> str:
    introduction = (
        f"Gates of {measured.run} (0: shut, 1: open), for each token as it is read, by Engram layer and residual "
        "stream. The last row: by how many nats the memory lowers the loss of the token that follows.",
        "First sentences that were not chosen by what the model does with them; then the held-out lines for which the "
        "memory saves most, which were.",
    )
    return page("Where the memory's gates open", introduction, measured.sentences)


def picture(sentences: Sequence[Sentence]) -> Figure:
    """Heat maps of the first sentences and the first held-out lines, one below the other."""
    half = IN_PICTURE // 2
    shown = [*sentences[: len(SENTENCES)][:half], *sentences[len(SENTENCES) :][: IN_PICTURE - half]]
    streams = sum(gate_TM.shape[1] for gate_TM in shown[0].gates.values())
    longest = max(len(sentence.tokens) for sentence in shown)
    size = (3 + 0.42 * longest, len(shown) * (1.4 + 0.3 * streams))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    images = [draw_gates(axes, one.tokens, one.gates) for axes, one in zip(panels, shown, strict=True)]
    for axes, sentence in zip(panels, shown, strict=True):
        axes.set_title(sentence.caption.split("\n")[0], fontsize=9, loc="left", parse_math=False)
        axes.tick_params(labelsize=8)
    figure.colorbar(images[0], ax=panels.tolist(), label="gate", fraction=0.03, pad=0.01)
    return figure


# --- the report ---


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A line for every layer, stream and quantity."""
    for (layer, stream), numbers in measured.correlations.items():
        for name, by in numbers.items():
            of = {"layer": int(layer), "stream": stream, "quantity": name}
            yield of | {
                "mean": by.mean,
                "std_seeds": by.std,
                "by_seed": dict(zip(measured.seeds, by.values, strict=True)),
            }


def report(measured: Measured) -> list[str]:
    header = ["layer", "stream", MEAN, SPREAD, FREQUENCY, LAYER, MEMORY]
    body = [
        [layer, str(stream), *(numbers[name].text(".3f" if name in (MEAN, SPREAD) else "+.3f") for name in header[2:])]
        for (layer, stream), numbers in measured.correlations.items()
    ]
    return [
        "## Verdict",
        "",
        *(f"- {sentence}" for sentence in verdict(measured)),
        "",
        "## Gates and what they go with",
        "",
        *table(header, body),
        "",
        f"Spearman's rank correlation over {measured.num_tokens:,} held-out tokens of the gate at a token with: how "
        "often the n-gram that ends there occurs in the training text; the nats that this layer saves on the token "
        "that follows (that layer's memory off, less as trained); the nats by which the twin without memory is worse "
        f"there. {trained_runs.seeds_said(measured.seeds)}",
        "",
        "gates.html shows every gate over sentences and held-out lines, gates.png some of them.",
    ]


def verdict(measured: Measured) -> list[str]:
    """What the numbers say, a sentence each."""
    sentences = []
    for name, what in (
        (FREQUENCY, "the frequency of the n-gram"),
        (LAYER, "what their layer saves on the next token"),
        (MEMORY, "what the model saves against its twin"),
    ):
        by_branch = {branch: numbers[name] for branch, numbers in measured.correlations.items()}
        known = {branch: by for branch, by in by_branch.items() if not np.isnan(by.mean)}
        if not known:
            sentences.append(f"No gate varies, so none goes with {what}.")
            continue
        layer, stream = max(known, key=lambda branch: abs(known[branch].mean))
        strongest = known[layer, stream]
        sure = [by for by in known.values() if by.differs_from()]
        up, down = sum(by.mean > 0 for by in sure), sum(by.mean < 0 for by in sure)
        beyond = beyond_what(measured.seeds)
        sentences.append(
            f"{up} of {len(by_branch)} gates open wider with {what}, {down} shut, {beyond}; the strongest is layer "
            f"{layer}, stream {stream}: rank correlation {strongest.text()}, {_strength(strongest.mean)}."
        )
    return sentences


def _strength(correlation: float) -> str:
    """Cohen's words (1988): small from 0.1, medium from 0.3, large from 0.5."""
    size = abs(correlation)
    return "negligible" if size < 0.1 else "small" if size < 0.3 else "medium" if size < 0.5 else "large"
