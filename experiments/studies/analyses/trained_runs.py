"""What studies that look into finished pairs of runs share: pairing by seed, the same text, files written whole."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from engram_jax.analysis.segments import Segment
from engram_jax.commands.command_line import keep_compiled_programs
from engram_jax.data.tokenizer import load_tokenizer
from engram_jax.errors import RunError
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.runs.settings import read_config
from experiments.studies.engine.declared import FinishedRun
from experiments.studies.engine.files import whole, write_text
from experiments.studies.engine.results import result_of
from experiments.studies.trained.pair import ENGRAM, MOE

TWIN, TRAINED, OFF = "moe", "as trained", "memory off"
"""Variants of a pair: without memory, with it, and with it switched off."""
DIFFERENCE = f"{ENGRAM} - {MOE}"
KIND = "kind"
"""How tokens are grouped by engram_jax/analysis/token_classes.py."""
MOST_TOKENS = 400_000
"""Of held-out text that are scored; of more, windows evenly spread."""


class Scores(NamedTuple):
    """Of every token asked for, segment after segment."""

    losses_N: np.ndarray
    """float64, nats."""
    right_N: np.ndarray
    """float64, 1 where the most probable token was the right one."""


def pairs(runs: Sequence[FinishedRun]) -> list[tuple[int, Path, Path]]:
    """Seed, folder without memory, folder with memory; by seed."""
    folders = {(run.point, run.seed): run.folder for run in runs}
    return [(seed, folders[MOE, seed], folders[ENGRAM, seed]) for seed in sorted({run.seed for run in runs})]


def load(folder: Path) -> EvaluatedRun:
    """A finished run. Raises what `EvaluatedRun.load` does."""
    keep_compiled_programs(read_config(folder))
    return EvaluatedRun.load(folder, log=log)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_same_text(runs: Sequence[FinishedRun]) -> None:
    """Raises `RunError` where runs were not trained on one text with one tokenizer, so that tokens could be paired."""
    known: dict[tuple[str, str], str] = {}
    for run in runs:
        corpus = result_of(run.folder)["corpus_sha256"]
        known.setdefault((load_tokenizer(run.folder / "tokenizer.json").vocab_sha256, corpus), str(run.folder))
    if len(known) > 1:
        raise RunError(
            f"{' and '.join(known.values())} were trained on different texts or with different tokenizers, and what "
            "they say of single tokens cannot be compared: delete the runs that saw the other text, or start anew."
        )


def score(model: EvaluatedRun, segments: Sequence[Segment]) -> Scores:
    scored = model.score([segment.ids for segment in segments])
    losses, right = (np.concatenate([one[i] for one in scored]).astype(np.float64) for i in (0, 1))
    return Scores(losses, right)


def documents_of(segments: Sequence[Segment]) -> np.ndarray:
    """int64 [N]: the document of every token asked for."""
    return np.repeat([segment.document for segment in segments], [len(segment.ids) - 1 for segment in segments])


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, atomically; what could not be measured is null."""
    write_text(path, "".join(json.dumps(_without_nan(row)) + "\n" for row in rows))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def save_figure(figure: Figure, path: Path) -> None:
    """A PNG, atomically."""
    with whole(path) as own, warnings.catch_warnings():
        # Matplotlib's font lacks many scripts and draws boxes for them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(own, format="png")


def seeds_said(seeds: Sequence[int]) -> str:
    """What the numbers after ± and in brackets are."""
    if len(seeds) < 2:
        return "± standard error by documents. One seed: the spread over seeds is unknown."
    return f"± standard error by documents (standard deviation over the {len(seeds)} seeds in brackets)."


def beyond_what(seeds: Sequence[int]) -> str:
    """What a difference that `OverSeeds.differs_from` finds is larger than."""
    return "beyond the spread" if len(seeds) > 1 else "beyond the choice of documents"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
