"""The logit lens of every run, and CKA with soft alignment of every two runs (paper, section 6.1).

Each has the control that the paper lacks: the same model trained from another seed. CKA compares runs of different
seeds only. Twins of one seed begin with the same weights and read the same batches. Two runs of the control do not, so
twins would be alike for a reason that is not the memory.

Legend: S seeds, T tokens, L layers, D hidden size, N names; A layers of one model, B of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engram_jax.analysis.cka import cka, minibatches, soft_alignment
from engram_jax.analysis.hidden_states import states_at
from engram_jax.analysis.logit_lens import logit_lens
from engram_jax.analysis.segments import Segment, segments, spread_evenly
from engram_jax.analysis.token_classes import CLASSES, token_kinds
from engram_jax.errors import RunError
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.evaluation.statistics import Metric
from experiments.studies.analyses import trained_runs
from experiments.studies.engine.declared import FinishedRun
from experiments.studies.trained.pair import ENGRAM, MOE

MOST_TOKENS = 32_768
"""Held-out tokens that the lens reads; about every 14th ends a name."""
FEWEST_NAMES = 64
MINIBATCH = 256
"""Names in a minibatch of CKA; the paper does not say its number."""
NAMES = ("identifier", "name")
"""Classes of engram_jax/analysis/token_classes.py that count as names."""
NEAREST = 5 / 30
"""Share of the layers that soft alignment weighs, as in the paper; at least two layers."""


@dataclass(frozen=True)
class Likeness:
    """CKA of two runs, layer by layer."""

    rows: str
    rows_seed: int
    columns: str
    columns_seed: int
    cka_AB: np.ndarray

    @property
    def alignment_B(self) -> np.ndarray:
        """Soft alignment: the layer of the rows' run that each layer of the columns' run is like."""
        return soft_alignment(self.cka_AB, nearest(len(self.cka_AB)))


@dataclass(frozen=True)
class Measured:
    seeds: tuple[int, ...]
    lenses: Mapping[str, list[dict[str, list[Metric]]]]
    """By point, one for each seed: by direction, a divergence for each layer."""
    likenesses: tuple[Likeness, ...]
    names: int
    """Names at whose ends CKA was computed."""

    def divergence(self, point: str, direction: str) -> np.ndarray:
        """[S, L], the embedding first."""
        return np.array([[metric.value for metric in lens[direction]] for lens in self.lenses[point]])

    def between(self, rows: str, columns: str) -> list[Likeness]:
        """Likenesses of runs of different seeds."""
        return [
            like
            for like in self.likenesses
            if (like.rows, like.columns) == (rows, columns) and like.rows_seed != like.columns_seed
        ]

    def alignment(self, rows: str, columns: str) -> np.ndarray:
        """[S, B]: for each run of `columns`, the mean over its references, the runs of `rows` with other seeds."""
        likenesses = self.between(rows, columns)
        return np.array(
            [np.mean([x.alignment_B for x in likenesses if x.columns_seed == seed], axis=0) for seed in self.seeds]
        )


def nearest(layers: int) -> int:
    """How many layers soft alignment weighs."""
    return max(2, round(NEAREST * layers))


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """The lens over held-out text for every run; CKA at the ends of its names for every two runs.

    Raises:
      RunError: the runs read different texts, one cannot be read, or the text has too few names.
    """
    trained_runs.check_same_text(runs)
    ordered = sorted(runs, key=lambda run: (run.seed, run.point))
    lenses: dict[str, list[dict[str, list[Metric]]]] = {}
    states: dict[tuple[str, int], np.ndarray] = {}
    text, places = [], []
    for run in ordered:
        model = trained_runs.load(run.folder)
        if not text:
            own = OwnText(model)
            source = own.data.validation
            text = segments(source, spread_evenly(np.arange(len(source)), source.seq_len, MOST_TOKENS))
            places = ends_of_names(model, own, text)
            if (count := sum(map(len, places))) < FEWEST_NAMES:
                raise RunError(
                    f"The held-out text has {count} names of several tokens, and CKA needs {FEWEST_NAMES}: train the "
                    "study on a larger text, or hold out more of it (data.holdout_fraction)."
                )
        trained_runs.log(f"depth: {run.point}, seed {run.seed}")
        ids = [segment.ids for segment in text]
        lens = logit_lens(model, ids, [segment.document for segment in text])
        lenses.setdefault(run.point, []).append(lens)
        # Without the embedding, as in the paper.
        states[run.point, run.seed] = states_at(model, [x[:-1] for x in ids], places)[1:]
        del model  # one run's tables in memory at a time
    names = sum(map(len, places))
    return Measured(tuple(sorted({run.seed for run in runs})), lenses, tuple(likenesses(states)), names)


def likenesses(states: dict[tuple[str, int], np.ndarray]) -> Iterator[Likeness]:
    """CKA of every two runs that the report compares, from states [L, N, D] by point and seed."""
    for pair in ((MOE, MOE), (MOE, ENGRAM), (ENGRAM, ENGRAM)):
        for ours, theirs in ((a, b) for a in states for b in states if (a[0], b[0]) == pair and a != b):
            yield Likeness(*ours, *theirs, cka(minibatches(states[ours], states[theirs], MINIBATCH)))


def ends_of_names(model: EvaluatedRun, own: OwnText, text: Sequence[Segment]) -> list[np.ndarray]:
    """In each segment, the last tokens of identifiers and names that the tokenizer splits: int64 positions.

    The paper takes the last tokens of Few-NERD's named entities. To know a name of several tokens, a model has to put
    them together, which is what n-grams are for.
    """
    stream = own.data.validation.stream
    bounds = np.append(np.asarray(stream.starts), stream.num_tokens)
    ends: dict[int, np.ndarray] = {}
    for document in {segment.document for segment in text}:
        ids = stream.tokens[bounds[document] : bounds[document + 1]]
        ends[document] = last_tokens(*token_kinds(model.tokenizer, ids))
    found = []
    for segment in text:
        places = ends[segment.document] - segment.start
        # The last id of a segment is only predicted; the first one may continue a name.
        found.append(places[(places > 0) & (places < len(segment.ids) - 1)])
    return found


def last_tokens(classes_T: np.ndarray, continues_T: np.ndarray) -> np.ndarray:
    """Positions of tokens that end a name of two tokens or more: they continue one, and the next token does not."""
    is_name_T = np.isin(classes_T, [CLASSES.index(name) for name in NAMES])
    is_last_T = continues_T & is_name_T & ~np.append(continues_T[1:], True)
    return np.flatnonzero(is_last_T)
