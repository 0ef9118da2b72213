"""The study `depth`: does memory make a model deeper (paper, section 6.1)? The logit lens, and CKA with soft alignment,
each with the control that the paper lacks: the same model trained from another seed.

CKA compares runs of different seeds only. Twins of one seed begin with the same weights and see the same batches, which
two runs of the control do not: that would make them alike for a reason that is not the memory.

Legend: T tokens, L layers, D hidden size, N names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.analysis.cka import cka, minibatches
from engram_jax.analysis.hidden_states import states_at
from engram_jax.analysis.logit_lens import logit_lens
from engram_jax.analysis.segments import Segment, segments, spread_evenly
from engram_jax.analysis.token_classes import CLASSES, token_kinds
from engram_jax.errors import RunError
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.evaluation.statistics import Metric
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.depth.picture import draw
from experiments.studies.analyses.depth.report import Likeness, Measured, report, rows
from experiments.studies.engine.declared import FinishedRun
from experiments.studies.trained.pair import ENGRAM, MOE

MOST_TOKENS = 32_768
"""Of held-out text that the lens reads; every 14th or so ends a name."""
FEWEST_NAMES = 64
MINIBATCH = 256
"""Names that CKA takes at a time; the paper does not say."""
NAMES = ("identifier", "name")
"""Of engram_jax/analysis/token_classes.py."""


def analyse(runs: Sequence[FinishedRun], folder: Path) -> list[str]:
    """results.jsonl, lens.png, and with two seeds or more cka.png and alignment.png in `folder`; the report's lines."""
    measured = measure(runs)
    trained_runs.write_rows(folder / "results.jsonl", rows(measured))
    draw(measured, paper(), folder)
    return report(measured)


def measure(runs: Sequence[FinishedRun]) -> Measured:
    """The lens over held-out text for every run; CKA at the ends of its names for every two runs.

    Raises:
      RunError: runs with different texts, or that cannot be read; a text with too few names.
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
        states[run.point, run.seed] = states_at(model, [x[:-1] for x in ids], places)[
            1:
        ]  # as the paper, without the embedding
        del model  # one run's tables in memory at a time
    names = sum(map(len, places))
    return Measured(tuple(sorted({run.seed for run in runs})), lenses, tuple(likenesses(states)), names)


def likenesses(states: dict[tuple[str, int], np.ndarray]) -> Iterator[Likeness]:
    """Of every two runs that the report asks for, from [L, N, D] of each."""
    pairs = ((MOE, MOE), (MOE, ENGRAM), (ENGRAM, ENGRAM))
    for pair in pairs:
        for ours, theirs in ((a, b) for a in states for b in states if (a[0], b[0]) == pair and a != b):
            yield Likeness(*ours, *theirs, cka(minibatches(states[ours], states[theirs], MINIBATCH)))


def ends_of_names(model: EvaluatedRun, own: OwnText, text: Sequence[Segment]) -> list[np.ndarray]:
    """In each segment, the last tokens of identifiers and names that the tokenizer splits: int64 positions.

    The paper takes the last tokens of Few-NERD's named entities. Where a name is several tokens, they have to be put
    together to know it, which is what n-grams are for.
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
        # The last id of a segment is only predicted; the first one may be a name's rest.
        found.append(places[(places > 0) & (places < len(segment.ids) - 1)])
    return found


def last_tokens(classes_T: np.ndarray, continues_T: np.ndarray) -> np.ndarray:
    """Positions of tokens that end a name of two tokens or more: they continue one, and the next token does not."""
    is_name_T = np.isin(classes_T, [CLASSES.index(name) for name in NAMES])
    is_last_T = continues_T & is_name_T & ~np.append(continues_T[1:], True)
    return np.flatnonzero(is_last_T)


def paper() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[2] / "paper" / "depth_paper.json").read_text())
