"""The task `longppl`: perplexity over the tokens that a long context helps with (Fang et al. 2024, arXiv:2410.23771).

p(x | long) is given everything before a token, p(x | short) only the last K tokens or a few more. A token is a key
token where

    LSD = log p(x | long) - log p(x | short) > alpha = 2     (the long context helps)
    LCL = log p(x | long)                    > beta = -2     (with it the token is well predicted)

LongPPL = exp(mean of -log p(x | long) over key tokens). An evaluator decides which tokens are key, the same for all
models that are compared. Without one, each run decides for itself, and its number cannot be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engram_jax.config import require
from engram_jax.evaluation.statistics import ratio
from engram_jax.evaluation.tasks import Result, Shared

if TYPE_CHECKING:
    from engram_jax.evaluation.evaluated_run import EvaluatedRun

SHORT_SHARE = 8  # 4,096 of 32,768 tokens in the paper
BATCHES_AT_A_TIME = 32
FEW_KEYS = 100
"""Key tokens below which a warning says that there are few."""
SLIDE_SHARE = 4  # 1,024 of 4,096 in its code


@dataclass(frozen=True)
class LongPPL:
    """Perplexity over the tokens that long context helps with."""

    context: int = 0
    """Tokens of the long context: documents are cut into pieces of this length. 0: the length of training."""
    short_context: int = 0
    """Tokens of the short context (K). 0: an eighth of the long context, as published (4,096 for 32,768)."""
    slide: int = 0
    """Tokens that share one short window: they see K to K + slide - 1 tokens. 0: a quarter of K, as published."""
    alpha: float = 2.0
    """A key token gains more than this from the long context, in nats (LSD)."""
    beta: float = -2.0
    """A key token has a log probability above this with the long context, in nats (LCL)."""
    evaluator: Path | None = None
    """Folder of the run that decides which tokens are key. Default: the run itself."""

    def __post_init__(self):
        for name in ("context", "short_context", "slide"):
            value = getattr(self, name)
            require(value >= 0, f"longppl.{name}={value} must be 0 or positive.")

    def __call__(self, model: EvaluatedRun, shared: Shared, argument: str = "") -> Result:
        from engram_jax.evaluation.documents import OwnText, open_documents

        require(not argument, f"longppl:{argument} takes no argument: give the text with --corpus.")
        context = self.context or model.context
        short = self.short_context or max(1, context // SHORT_SHARE)
        require(short < context, f"longppl.short_context={short} must be below the context of {context} tokens.")
        slide = self.slide or max(1, short // SLIDE_SHARE)
        evaluator = self._evaluator(model)
        documents = open_documents(model, shared, OwnText(model))
        tally: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
        longest = 0
        for group in _groups(documents, context, short, model.batch_tokens):
            pieces = [piece for _, piece in group]
            long = [scored.losses for scored in model.score(pieces)]
            judged = long if evaluator is model else [scored.losses for scored in evaluator.score(pieces)]
            judged_short = short_losses(evaluator, pieces, short, slide)
            for (document, _), ours, theirs, of_short in zip(group, long, judged, judged_short, strict=True):
                is_key = key_tokens(theirs, of_short, self.alpha, self.beta)
                measured = ours[short - 1 :].astype(np.float64)
                key_losses = ours[is_key].astype(np.float64)
                tally[document] += key_losses.sum(), len(key_losses), measured.sum(), len(measured)
                longest = max(longest, len(ours))
        sums, keys, long_sums, tokens = np.array([*tally.values()]).reshape(-1, 4).T
        require(
            sum(tokens) > 0,
            f"longppl: no document of {documents.name} has more than longppl.short_context={short} tokens. "
            "Lower it, or give longer documents with --corpus: JSONL has one per line, .txt files are cut into pieces.",
        )
        for run in {model, evaluator}:
            run.warn_if_longer(longest, f"longppl: a document of {documents.name}")
        key_loss = ratio(sums, keys)
        if sum(keys) < FEW_KEYS:
            model.warn_once(
                f"longppl: only {sum(keys):.0f} of {sum(tokens):,.0f} tokens are key tokens, so the number means "
                "little. Give more or longer documents, or a model that gains from its context."
            )
        metrics = {
            "longppl": key_loss.exp() if sum(keys) else key_loss,
            "perplexity": ratio(long_sums, tokens).exp(),
            "key_share": ratio(keys, tokens, unit="share of tokens"),
        }
        details = {
            "corpus": documents.name,
            "context": context,
            "short_context": short,
            "slide": slide,
            "alpha": self.alpha,
            "beta": self.beta,
            "evaluator": str(self.evaluator) if self.evaluator else "the run itself",
            "num_key_tokens": int(sum(keys)),
            "num_tokens": int(sum(tokens)),
        }
        return Result(metrics, details)

    def _evaluator(self, model: EvaluatedRun) -> EvaluatedRun:
        from engram_jax.evaluation.evaluated_run import EvaluatedRun

        if self.evaluator is None:
            return model
        evaluator = EvaluatedRun.load(self.evaluator, model.batch_tokens, log=model.log)
        require(
            evaluator.tokenizer.backend.to_str() == model.tokenizer.backend.to_str(),
            f"longppl.evaluator={str(self.evaluator)!r} has another tokenizer than {model.name}: choose a run that was "
            "trained with the same tokenizer.",
        )
        return evaluator


def key_tokens(long_losses: np.ndarray, short_losses: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """bool [T - 1]: LSD > alpha and LCL > beta, from losses in nats (-log p). A token without a short loss (NaN) is not
    key.
    """
    with np.errstate(invalid="ignore"):
        return (short_losses - long_losses > alpha) & (-long_losses > beta)


def short_losses(model: EvaluatedRun, pieces: list[np.ndarray], short: int, slide: int) -> list[np.ndarray]:
    """float32 [T - 1] for each piece of T ids: losses given only the last `short` to `short + slide - 1` ids.

    An id with fewer ids before it has NaN. For the first `slide` other ids the short context is the long one.
    """
    windows = [
        (number, start, ids[start : start + short + slide])
        for number, ids in enumerate(pieces)
        for start in range(0, len(ids) - short, slide)
    ]
    losses = [np.full(len(ids) - 1, np.nan, np.float32) for ids in pieces]
    for (number, start, ids), scored in zip(windows, model.score([w[2] for w in windows]), strict=True):
        losses[number][start + short - 1 : start + len(ids) - 1] = scored.losses[short - 1 :]
    return losses


def _groups(
    documents: Iterable[np.ndarray], context: int, short: int, batch_tokens: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Pieces of documents, `context` ids and one to predict, each with its document's number; a few batches at a time.

    Pieces that do not reach beyond the short context are left out.
    """
    group: list[tuple[int, np.ndarray]] = []
    for number, ids in enumerate(documents):
        for start in range(0, len(ids) - 1, context):
            piece = ids[start : start + context + 1]
            if len(piece) > short + 1:
                group.append((number, piece))
        if sum(len(piece) for _, piece in group) >= BATCHES_AT_A_TIME * batch_tokens:
            yield group
            group = []
    if group:
        yield group
