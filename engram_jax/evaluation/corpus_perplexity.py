"""The task `perplexity`: loss, perplexity and bits per byte over the documents of any corpus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_jax.config import ConfigError, require
from engram_jax.data.ngram_frequency import BUCKETS, NgramCounts, bucket_names
from engram_jax.evaluation.statistics import ratio
from engram_jax.evaluation.tasks import Result, Shared

if TYPE_CHECKING:
    from engram_jax.evaluation.documents import OwnText
    from engram_jax.evaluation.evaluated_run import EvaluatedRun, Scored


@dataclass(frozen=True)
class Perplexity:
    """Loss, perplexity, bits per byte; by how often the last n-gram was seen in training, and by position."""

    context: int = 0
    """Most tokens of context. 0: the length the run was trained at (data.seq_len)."""
    stride: int = 0
    """Tokens between the windows in which documents longer than the context are scored. 0: half the context."""
    ngram_order: int = 3
    """Tokens of the n-grams whose occurrences in the training text are counted. 0: do not count."""

    def __post_init__(self):
        for name in ("context", "stride", "ngram_order"):
            value = getattr(self, name)
            require(value >= 0, f"perplexity.{name}={value} must be 0 or positive.")

    def __call__(self, model: EvaluatedRun, shared: Shared, argument: str = "") -> Result:
        from engram_jax.evaluation.documents import Fingerprint, OwnText, open_documents
        from engram_jax.evaluation.windows import score_documents

        require(not argument, f"perplexity:{argument} takes no argument: give the text with --corpus.")
        context = self.context or model.context
        stride = self.stride or max(1, context // 2)
        require(stride <= context, f"perplexity.stride={stride} must lie in 1..context={context}.")
        byte_lengths, own = model.tokenizer.byte_lengths(), OwnText(model)
        documents = open_documents(model, shared, own)
        counts = self._counts(model, own)
        tally, scored_tokens = Tally(byte_lengths, counts), Fingerprint()
        for ids, scored in score_documents(model, documents, context, stride):
            model.warn_if_longer(min(len(ids) - 1, context), f"perplexity: a document of {documents.name}")
            tally.add(ids, scored)
            scored_tokens.add(ids)
        settings = {"corpus": documents.name, "context": context, "stride": stride, "ngram_order": self.ngram_order}
        result = tally.result()
        return Result(result.metrics, settings | result.details | {"documents_sha256": scored_tokens.hexdigest()})

    def _counts(self, model: EvaluatedRun, own: OwnText) -> NgramCounts | None:
        if not self.ngram_order:
            return None
        try:
            return NgramCounts.of(own.data.train.stream.tokens, self.ngram_order)
        except ConfigError as error:
            model.warn_once(f"losses by n-gram frequency are left out: the training text cannot be read. {error}")
            return None


class Tally:
    """Sums by document, which give means and standard errors that are clustered by document."""

    def __init__(self, byte_lengths: np.ndarray, counts: NgramCounts | None):
        self._byte_lengths, self._counts = byte_lengths, counts
        self._losses: list[float] = []
        self._correct: list[int] = []
        self._tokens: list[int] = []
        self._bytes: list[int] = []
        self._by_frequency: list[tuple[np.ndarray, np.ndarray]] = []
        self._by_position: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, scored: Scored) -> None:
        """Adds a document: its ids with bos, and the scores of all ids but the first."""
        losses = scored.losses.astype(np.float64)
        self._losses.append(float(losses.sum()))
        self._correct.append(int(scored.is_greedy.sum()))
        self._tokens.append(len(losses))
        self._bytes.append(int(self._byte_lengths[ids[1:]].sum()))
        self._by_position.append(_summed(position_bucket(np.arange(1, len(ids))), losses, len(POSITIONS)))
        if self._counts is not None and len(losses):
            seen = self._counts.lookup(ids[None, :-1])[0]  # of the n-gram the model has just read
            bucket = np.searchsorted([low for low, _ in BUCKETS], seen, side="right") - 1
            self._by_frequency.append(_summed(bucket, losses, len(BUCKETS)))

    def result(self) -> Result:
        loss = ratio(self._losses, self._tokens, unit="nats per token")
        metrics = {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": ratio(
                np.array(self._losses) / math.log(2), self._bytes, count=loss.count, unit="bits per byte"
            ),
            "accuracy": ratio(self._correct, self._tokens, unit="next token right", higher_is_better=True),
        }
        details: dict[str, Any] = {
            "num_documents": len(self._tokens),
            "num_tokens": sum(self._tokens),
            "num_bytes": sum(self._bytes),
            "by_position": _means(position_names(), self._by_position),
            "by_ngram_frequency": _means(bucket_names(), self._by_frequency),
            "per_document": {"loss": self._losses, "tokens": self._tokens, "bytes": self._bytes},
        }
        return Result(metrics, details)


POSITIONS = tuple([1] + [1 << k for k in range(5, 22)])
"""First position of each bucket: 1-31, 32-63, 64-127, ... and from 2^21 on."""


def position_bucket(positions: np.ndarray) -> np.ndarray:
    """Index into POSITIONS for positions that count from 1, the first token after bos."""
    return np.searchsorted(POSITIONS, positions, side="right") - 1


def position_names() -> list[str]:
    ends = [str(following - 1) for following in POSITIONS[1:]]
    return [f"{first}-{last}" for first, last in zip(POSITIONS, ends, strict=False)] + [f"{POSITIONS[-1]}+"]


def _summed(bucket: np.ndarray, losses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.bincount(bucket, losses, size), np.bincount(bucket, minlength=size)


def _means(names: Sequence[str], by_document: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """By bucket: loss, its standard error, share of the tokens. Empty buckets are left out."""
    if not by_document:
        return {}
    sums, sizes = (np.stack(column) for column in zip(*by_document, strict=True))
    means = {}
    for index, name in enumerate(names):
        if count := int(sizes[:, index].sum()):
            metric = asdict(ratio(sums[:, index], sizes[:, index]))
            means[name] = {"loss": metric["value"], "stderr": metric["stderr"], "share": count / int(sizes.sum())}
    return means
