"""Finished runs of `pair` as analyses read them: paired by seed, on the same text, scored token by token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engram_jax.analysis.segments import Segment
from engram_jax.commands.command_line import keep_compiled_programs
from engram_jax.data.tokenizer import load_tokenizer
from engram_jax.errors import RunError
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.runs.settings import read_config
from experiments.studies.engine.declared import FinishedRun
from experiments.studies.engine.results import result_of
from experiments.studies.trained.pair import ENGRAM, MOE

DIFFERENCE = f"{ENGRAM} - {MOE}"
"""Name of the loss with memory minus the twin's."""


class Scores(NamedTuple):
    """A run's score of every predicted token, segment after segment."""

    losses_N: np.ndarray
    """float64, nats."""
    right_N: np.ndarray
    """float64, 1 where the most probable token was the right one."""


def pairs(runs: Sequence[FinishedRun]) -> list[tuple[int, Path, Path]]:
    """(seed, folder without memory, folder with memory), in the order of the seeds."""
    folders = {(run.point, run.seed): run.folder for run in runs}
    return [(seed, folders[MOE, seed], folders[ENGRAM, seed]) for seed in sorted({run.seed for run in runs})]


def load(folder: Path) -> EvaluatedRun:
    """A finished run. Raises what `EvaluatedRun.load` raises."""
    keep_compiled_programs(read_config(folder))
    return EvaluatedRun.load(folder, log=log)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_same_text(runs: Sequence[FinishedRun]) -> None:
    """Raises `RunError` unless all runs were trained on one text with one tokenizer, so that tokens can be paired."""
    known: dict[tuple[str, str], str] = {}
    for run in runs:
        corpus = result_of(run.folder)["corpus_sha256"]
        known.setdefault((load_tokenizer(run.folder / "tokenizer.json").vocab_sha256, corpus), str(run.folder))
    if len(known) > 1:
        raise RunError(
            f"{' and '.join(known.values())} were trained on different texts or with different tokenizers, so their "
            "tokens cannot be compared. Delete the runs that read the other text, or start a new study with --out."
        )


def score(model: EvaluatedRun, segments: Sequence[Segment]) -> Scores:
    """Scores of all predicted tokens, N in all."""
    scored = model.score([segment.ids for segment in segments])
    losses, right = (np.concatenate([one[i] for one in scored]).astype(np.float64) for i in (0, 1))
    return Scores(losses, right)


def documents_of(segments: Sequence[Segment]) -> np.ndarray:
    """int64 [N]: the document of every predicted token."""
    return np.repeat([segment.document for segment in segments], [len(segment.ids) - 1 for segment in segments])
