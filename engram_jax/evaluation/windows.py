"""Windows that overlap, for documents longer than the context.

Let C be the context and S the stride. The first window scores C tokens. Each later window scores the next S tokens, and
begins C - S + 1 tokens before them. So every token is scored once. Up to C tokens it sees its whole document; after
that, it sees at least C - S + 1 tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from engram_jax.config import require
from engram_jax.evaluation.evaluated_run import EvaluatedRun, Scored

BATCHES_AT_A_TIME = 32
SECONDS_PER_LINE = 10.0


@dataclass(frozen=True)
class Window:
    """Ids [start, stop) of a document; those from `scored_from` on are scored. Positions count from the bos."""

    start: int
    stop: int
    scored_from: int


def windows(length: int, context: int, stride: int) -> list[Window]:
    """The windows of a document of `length` ids; none for a single id, which has no context.

    A window has at most `context` + 1 ids: the last one is only predicted.
    """
    require(context > 0, f"context={context} must be positive.")
    require(0 < stride <= context, f"stride={stride} must lie in 1..context={context}.")
    if length < 2:
        return []
    found = [Window(0, min(length, context + 1), 1)]
    while (following := found[-1].stop) < length:
        found.append(Window(following + stride - context - 1, min(length, following + stride), following))
    return found


def score_documents(
    model: EvaluatedRun, documents: Iterable[np.ndarray], context: int, stride: int
) -> Iterator[tuple[np.ndarray, Scored]]:
    """Each document with the losses of its ids but the first. A few batches of documents are in memory at a time."""
    group: list[np.ndarray] = []
    done, last_line = 0, time.monotonic()
    for ids in documents:
        group.append(ids)
        if sum(map(len, group)) >= BATCHES_AT_A_TIME * model.batch_tokens:
            yield from _score_group(model, group, context, stride)
            done, group = done + sum(map(len, group)), []
            if time.monotonic() - last_line > SECONDS_PER_LINE:
                last_line = time.monotonic()
                model.log(f"{model.name}: {done:,} tokens scored.")
    yield from _score_group(model, group, context, stride)


def _score_group(
    model: EvaluatedRun, group: list[np.ndarray], context: int, stride: int
) -> Iterator[tuple[np.ndarray, Scored]]:
    cut = [windows(len(ids), context, stride) for ids in group]
    scored = iter(model.score([ids[w.start : w.stop] for ids, ws in zip(group, cut, strict=True) for w in ws]))
    for ids, ws in zip(group, cut, strict=True):
        losses, is_greedy = np.zeros(len(ids) - 1, np.float32), np.zeros(len(ids) - 1, bool)
        for w in ws:
            of_window = next(scored)
            new = slice(w.scored_from - w.start - 1, None)
            losses[w.scored_from - 1 : w.stop - 1] = of_window.losses[new]
            is_greedy[w.scored_from - 1 : w.stop - 1] = of_window.is_greedy[new]
        yield ids, Scored(losses, is_greedy)
