"""Batches of windows: shuffled, assembled ahead of time, resumable at any step, on each process its own rows.

A batch is a pure function of (seed, step), so the whole state of the stream is one integer. The global batch of step s
is windows [s*B, s*B + B) of grain's endless shuffle, whatever the number of processes; each of them assembles the rows
of it that its devices need.

Legend: B global batch size, b rows of it on this process, T tokens of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from engram_jax.config import DataConfig, require
from engram_jax.data.mixture import ChainedStream, Mixture, chained, open_sources
from engram_jax.data.packing import TokenisedCorpus, WindowSource, tokenise_corpus
from engram_jax.data.tokenizer import Tokenizer, tokenizer_for

Batch = dict[str, np.ndarray]
# One thread assembles tens of millions of tokens per second; more of them only contend.
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclass(frozen=True)
class TextData:
    """Everything a run reads."""

    tokenizer: Tokenizer
    train: WindowSource
    validation: WindowSource
    corpus_sha256: str
    """Of the documents' contents (of a mixture: of its sources' and weights); every process of a run must have the
    same."""


def load_data(config: DataConfig, vocab_size: int, log: Callable[[str], None] = print) -> TextData:
    """Opens the corpus, trains or loads the tokenizer, tokenises: all cached, so only the first run takes its time.

    Every process calls it; those that share a file system build the cache once.

    Raises:
      ConfigError: anything wrong with the corpus, the tokenizer, the cache or the batch size.
    """
    sources = open_sources(config)
    corpora, weights = [corpus for corpus, _ in sources], [weight for _, weight in sources]
    tokenizer = tokenizer_for(config, vocab_size, chained(config.corpus, corpora), log)
    tokenised = [tokenise_corpus(config, corpus, tokenizer, log) for corpus in corpora]
    trains = [WindowSource(t.train, config.seq_len, tokenizer.pad_id, keep_partial=False) for t in tokenised]
    held_out = ChainedStream.of([t.validation for t in tokenised]) if len(corpora) > 1 else tokenised[0].validation
    validation = WindowSource(held_out, config.seq_len, tokenizer.pad_id, keep_partial=True)
    train = Mixture(trains, weights) if len(corpora) > 1 else trains[0]
    _check_enough_windows(train, config.batch_size)
    for corpus, weight, streams in zip(corpora, weights, tokenised, strict=True):
        share = f" ({weight / sum(weights):.1%} of the windows)" if len(corpora) > 1 else ""
        for name, stream in ((f"training{share}", streams.train), ("validation", streams.validation)):
            log(
                f"Corpus {corpus.name}, {name}: {stream.num_documents:,} documents, {stream.num_tokens:,} tokens, "
                f"{stream.num_bytes / max(stream.num_tokens, 1):.2f} bytes per token."
            )
    return TextData(tokenizer, train, validation, _fingerprint(tokenised, weights))


def _fingerprint(tokenised: Sequence[TokenisedCorpus], weights: Sequence[float]) -> str:
    if len(tokenised) == 1:
        return tokenised[0].sha256
    lines = [f"{corpus.sha256} {weight}" for corpus, weight in zip(tokenised, weights, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Batches:
    """An endless iterator of training batches: dicts of int32 [b, T] arrays (see WindowSource).

    `get_state()` is a JSON-able dict that stands for the next batch; it holds for any rows and worker count.
    Use it as a context manager, or `close()` it: it owns threads or worker processes.
    """

    def __init__(self, batches: grain.MapDataset, worker_count: int, start_step: int):
        self._batches = batches
        self._worker_count = worker_count
        self._iterator: grain.DatasetIterator | None = None
        self._step = start_step

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._step = int(state["next_step"])

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> grain.DatasetIterator:
        # Batching comes before the workers, so their number cannot change the stream; starting at a slice instead of
        # restoring grain's own state, which records the number of workers, keeps it free across a resume.
        ahead = self._batches[self._step :].to_iter_dataset(READ_OPTIONS)
        if self._worker_count:
            # grain reads its absl flags in the workers' parent; outside absl's app.run nobody has parsed them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._worker_count))
        return iter(ahead)


class _Rows:
    """The given rows of batch after batch of endless windows, as grain sources are: `source[step]`."""

    def __init__(self, windows: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._windows, self._batch_size, self._rows = windows, batch_size, rows

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        windows = [self._windows[index * self._batch_size + row] for row in self._rows]
        return _stack([window for window in windows if window is not None])  # none is: nothing filters them


def train_batches(
    source: WindowSource,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    worker_count: int = 0,
    start_step: int = 0,
) -> Batches:
    """Batches of shuffled windows without end, every window once per epoch; each epoch has its own order. The sources
    of a mixture have epochs of their own.

    Args:
      batch_size: B, over all processes.
      rows: the rows of each global batch that are wanted here; None: all.
      worker_count: grain worker processes that assemble batches; 0: a thread of this one.

    Raises:
      ConfigError: B exceeds the number of windows, or the seed is negative.
    """
    _check_enough_windows(source, batch_size)
    require(0 <= seed < 1 << 32, f"data.seed={seed} must lie in 0..2^32-1.")
    windows = source.shuffled(seed)
    rows = range(batch_size) if rows is None else rows
    return Batches(grain.MapDataset.source(_Rows(windows, batch_size, rows)), worker_count, start_step)


def eval_batches(source: WindowSource, batch_size: int, max_batches: int = 0) -> Iterator[Batch]:
    """Windows in order, once; the last batch is filled up with padding rows.

    With fewer than all batches (`max_batches`, 0: all) the windows lie evenly spread over the split, so that the losses
    estimate the whole and not the first documents.
    """
    num_batches = -(-len(source) // batch_size)
    chosen = range(len(source))
    if 0 < max_batches < num_batches:
        num_batches, count = max_batches, max_batches * batch_size
        chosen = [i * len(source) // count for i in range(count)]
    for step in range(num_batches):
        slots = range(step * batch_size, (step + 1) * batch_size)
        yield _stack([source[chosen[i]] if i < len(chosen) else source.padding() for i in slots])


def _stack(windows: list[Batch]) -> Batch:
    return {name: np.stack([window[name] for window in windows]) for name in windows[0]}


def _check_enough_windows(source: WindowSource, batch_size: int) -> None:
    require(
        len(source) >= batch_size,
        f"data.batch_size={batch_size} exceeds the {len(source)} training windows of {source.seq_len} tokens that the "
        "corpus has. Lower data.batch_size or data.seq_len, or give more text.",
    )
