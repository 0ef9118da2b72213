"""The gates of every token, what they are correlated with, and sentences that show them.

Legend: N predicted tokens, T tokens of a sentence, M residual streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engram_jax.analysis.gates_page import Sentence
from engram_jax.analysis.groups import Grouping, joined, means, rank_correlation
from engram_jax.analysis.lookups import look_up, with_memory
from engram_jax.analysis.segments import Segment, segments, spread_evenly
from engram_jax.data.ngram_frequency import NgramCounts
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.evaluation.over_seeds import OverSeeds
from experiments.studies.analyses import trained_runs
from experiments.studies.engine.declared import FinishedRun

MOST_TOKENS = 30_000
"""Held-out tokens that are scored: a rank correlation then has a standard error of about 0.006 by tokens."""
SENTENCES = (
    "By the way, the Milky Way is older than the Solar System.",
    "Diana, Princess of Wales, never met Alexander the Great.",
    "for i in range(len(self.items)):\n    print(i)\n",
    'if __name__ == "__main__":\n    unittest.main()\n',
)
LINES = 6
"""Held-out lines that are shown."""
SHORTEST, LONGEST = 5, 30
"""Tokens of a held-out line that is shown."""
MEAN, SPREAD = "mean gate", "std over tokens"
FREQUENCY, LAYER, MEMORY = "n-gram's frequency", "saved by this layer", "saved against the twin"
"""Quantities that the gates are correlated with."""


@dataclass(frozen=True)
class Measured:
    seeds: tuple[int, ...]
    correlations: Mapping[tuple[str, int], Mapping[str, OverSeeds]]
    """By Engram layer and stream: mean gate, its standard deviation over tokens, and rank correlations by quantity."""
    sentences: tuple[Sentence, ...]
    """The first seed's gates over SENTENCES, then over held-out lines."""
    run: str
    """Name of the first seed's run."""
    num_tokens: int


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """Gates and losses on held-out text with every run.

    Raises:
      RunError: the runs read different texts, or one cannot be read.
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
    """One run's correlations, by layer and stream.

    Args:
      gates: by layer, [N, M].
      others: by layer, the quantities that its gates are correlated with: by name, [N].
    """
    whole = Grouping("", (MEAN,), np.zeros(len(document_N), np.int64))
    return {
        (layer, m): means([gate_N], whole, document_N)
        | {SPREAD: OverSeeds((float(gate_N.std()),))}
        | {name: rank_correlation(gate_N, other_N, document_N) for name, other_N in others[layer].items()}
        for layer, gate_NM in gates.items()
        for m, gate_N in enumerate(gate_NM.T)
    }


def own_sentences(model: EvaluatedRun) -> list[Sentence]:
    """SENTENCES as documents, each with the nats that the whole memory saves."""
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
