"""Documents -> one flat stream of tokens per split on disk -> fixed windows with segment ids and positions.

The stream is `[bos] document [eos] [bos] document [eos] ...` in corpus order, tokenised once and cached. Window i of
length T covers tokens [i*T, i*T + T) and asks for the next token of each; it never asks for a document's first token
from another document's last.

Legend: T tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np

from engram_jax.config import DataConfig, require
from engram_jax.data.cache import build_once, cache_key, cache_root
from engram_jax.data.corpora import Corpus, document_digest, is_held_out
from engram_jax.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
START_DTYPE = np.dtype("<i8")
BATCH_CHARACTERS = 4_000_000
SECONDS_PER_PROGRESS_LINE = 5.0


@dataclass(frozen=True)
class TokenStream:
    """One split of a tokenised corpus: files `SPLIT.tokens` and `SPLIT.starts` (offset of each document's bos)."""

    path: Path
    """The files' common name, without suffix."""
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of text, special tokens not counted."""

    # Opened on first use and left out of pickles: a pickled memmap carries its whole file.
    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.path.with_suffix(".tokens"), self.dtype, "r")

    @cached_property
    def starts(self) -> np.ndarray:
        return np.memmap(self.path.with_suffix(".starts"), START_DTYPE, "r")

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStream, (self.path, self.dtype, self.num_tokens, self.num_documents, self.num_bytes)

    def is_complete(self) -> bool:
        """Whether both files have the sizes they should."""
        sizes = {
            ".tokens": self.num_tokens * np.dtype(self.dtype).itemsize,
            ".starts": self.num_documents * START_DTYPE.itemsize,
        }
        files = {self.path.with_suffix(suffix): size for suffix, size in sizes.items()}
        return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


@dataclass(frozen=True)
class TokenisedCorpus:
    train: TokenStream
    validation: TokenStream
    sha256: str
    """Of all documents in order, both splits: equal on two machines if and only if they read the same text."""


class WindowSource:
    """Random access to windows of `seq_len` tokens, as grain sources are: `len(source)`, `source[i]`.

    `source[i]` is a dict of int32 [T] arrays: `tokens`; `targets`, the next token, or -1 where that belongs to another
    document; `segment_ids`, the documents of the window counted from 1, with 0 for padding; `positions`, counted from 0
    in each segment of the window. The stream's last, partial window is padded with `pad_id` if it is kept.
    """

    def __init__(self, stream: TokenStream, seq_len: int, pad_id: int, keep_partial: bool):
        """`keep_partial=False` drops the last, partial window unless it is the only one."""
        self.stream = stream
        self.seq_len = seq_len
        self.pad_id = pad_id
        full = stream.num_tokens // seq_len
        self.num_windows = -(-stream.num_tokens // seq_len) if keep_partial or full == 0 else full

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin = index * self.seq_len
        end = min(begin + self.seq_len, self.stream.num_tokens)
        # The stream ends with an eos, so a missing next token is another document's: -1 as well.
        tokens = np.full(self.seq_len + 1, self.pad_id, np.int32)
        read = self.stream.tokens[begin : end + 1]
        tokens[: len(read)] = read
        starts = self.stream.starts
        first, last = np.searchsorted(starts, [begin, end], side="right")
        is_start = np.zeros(self.seq_len + 1, bool)
        is_start[starts[first:last] - begin] = True
        is_start[end - begin] |= end == self.stream.num_tokens

        offsets = np.arange(self.seq_len, dtype=np.int32)
        real = offsets < end - begin
        segment_ids = 1 + np.cumsum(is_start[:-1], dtype=np.int32)
        positions = offsets - np.maximum.accumulate(np.where(is_start[:-1], offsets, 0))
        return {
            "tokens": np.where(real, tokens[:-1], np.int32(self.pad_id)),
            "targets": np.where(real & ~is_start[1:], tokens[1:], np.int32(-1)),
            "segment_ids": np.where(real, segment_ids, np.int32(0)),
            "positions": np.where(real, positions, np.int32(0)),
        }

    def shuffled(self, seed: int) -> grain.MapDataset:
        """Windows without end, every one once per epoch; each epoch has its own order."""
        return grain.MapDataset.source(self).shuffle(seed=seed).repeat()

    def padding(self) -> dict[str, np.ndarray]:
        """A window that holds nothing."""
        zeros = np.zeros(self.seq_len, np.int32)
        return {"tokens": zeros + self.pad_id, "targets": zeros - 1, "segment_ids": zeros, "positions": zeros.copy()}


def tokenise_corpus(
    config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, log: Callable[[str], None] = print
) -> TokenisedCorpus:
    """The corpus as token streams, from the cache or built in one pass that holds a few MB of text at a time.

    Raises:
      ConfigError: a split has no documents, a document cannot be read, or the cache cannot be written.
    """
    key = cache_key(
        kind="tokens 1",
        corpus=corpus.fingerprint,
        tokenizer=tokenizer.sha256,
        holdout_fraction=config.holdout_fraction,
    )

    def build(folder: Path) -> None:
        _write_streams(folder, corpus, tokenizer, config.holdout_fraction, log)

    folder = cache_root(config) / "tokens" / key
    build_once(folder, lambda path: _load(path) is not None, build, log)
    tokenised = _load(folder)
    assert tokenised is not None
    return tokenised


def _load(folder: Path) -> TokenisedCorpus | None:
    """The streams in `folder`, or None if they are missing or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        streams = {split: TokenStream(folder / split, **meta[split]) for split in SPLITS}
        sha256 = meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not all(stream.is_complete() for stream in streams.values()):
        return None
    return TokenisedCorpus(streams["train"], streams["validation"], sha256)


class _StreamWriter:
    """Appends documents to one split's files."""

    def __init__(self, path: Path, dtype: np.dtype, files: ExitStack):
        self.stream = TokenStream(path, dtype.str, 0, 0, 0)
        self.tokens_file = files.enter_context(path.with_suffix(".tokens").open("wb"))
        self.starts_file = files.enter_context(path.with_suffix(".starts").open("wb"))

    def append(self, documents: list[list[int]], num_bytes: int) -> None:
        s, dtype = self.stream, self.stream.dtype
        lengths = [len(document) for document in documents]
        offsets = np.cumsum([s.num_tokens, *lengths], dtype=START_DTYPE)
        self.tokens_file.write(np.concatenate([np.asarray(document, dtype) for document in documents]).tobytes())
        self.starts_file.write(offsets[:-1].tobytes())
        self.stream = TokenStream(
            s.path, dtype, int(offsets[-1]), s.num_documents + len(documents), s.num_bytes + num_bytes
        )

    def meta(self) -> dict:
        return {name: value for name, value in asdict(self.stream).items() if name != "path"}


def _write_streams(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, holdout_fraction: float, log: Callable[[str], None]
) -> None:
    folder.mkdir()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    corpus_hash = hashlib.sha256()
    started = last_line = time.monotonic()
    with ExitStack() as files:
        writers = {split: _StreamWriter(folder / split, dtype, files) for split in SPLITS}
        for texts in _batches(corpus):
            digests = [document_digest(text) for text in texts]
            corpus_hash.update(b"".join(digests))
            held_out = [is_held_out(digest, holdout_fraction) for digest in digests]
            encoded = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
            for split, wanted in zip(SPLITS, (False, True), strict=True):
                mine = [i for i, out in enumerate(held_out) if out == wanted]
                if mine:
                    num_bytes = sum(len(texts[i].encode()) for i in mine)
                    writers[split].append([encoded[i] for i in mine], num_bytes)
            now = time.monotonic()
            if now - last_line > SECONDS_PER_PROGRESS_LINE:
                last_line = now
                log(_progress(writers, now - started))
    for split, name in zip(SPLITS, ("training", "validation"), strict=True):
        require(writers[split].stream.num_documents > 0, corpus.empty_split_message(name, holdout_fraction))
    log(_progress(writers, time.monotonic() - started))
    meta = {split: writer.meta() for split, writer in writers.items()}
    (folder / "meta.json").write_text(json.dumps({"sha256": corpus_hash.hexdigest(), **meta}))


def _batches(corpus: Corpus) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in corpus:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _progress(writers: dict[str, _StreamWriter], seconds: float) -> str:
    streams = [writer.stream for writer in writers.values()]
    documents, tokens, num_bytes = (
        sum(getattr(stream, name) for stream in streams) for name in ("num_documents", "num_tokens", "num_bytes")
    )
    return (
        f"Tokenised {documents:,} documents, {num_bytes / 1e6:.1f} MB of text, {tokens / 1e6:.2f} M tokens "
        f"in {seconds:.0f} s."
    )
