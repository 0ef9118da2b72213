"""Documents of token ids for an evaluation: those that the run held out, or those of another corpus."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engram_jax.config import ConfigError, DataConfig
from engram_jax.data.corpora import Corpus
from engram_jax.data.loader import TextData, load_data
from engram_jax.data.mixture import chained, open_sources
from engram_jax.data.packing import TokenStream
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from engram_jax.evaluation.tasks import Shared

ENCODED_AT_A_TIME = 64


@dataclass(frozen=True)
class Documents:
    """The documents of a text: iterates over int32 arrays `[bos, ...ids, eos]`."""

    name: str
    """`held out of python`, or the corpus as given."""
    model: EvaluatedRun
    source: TokenStream | Corpus
    limit: int = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        documents = self._of_stream() if isinstance(self.source, TokenStream) else self._of_corpus()
        yield from documents

    def _of_stream(self) -> Iterator[np.ndarray]:
        """With a limit, documents evenly spread over the split, so that they represent all of it."""
        stream = self.source
        assert isinstance(stream, TokenStream)
        bounds = np.append(np.asarray(stream.starts), stream.num_tokens)
        count = min(self.limit or stream.num_documents, stream.num_documents)
        for number in range(count):
            index = number * stream.num_documents // count
            yield np.asarray(stream.tokens[bounds[index] : bounds[index + 1]], np.int32)

    def _of_corpus(self) -> Iterator[np.ndarray]:
        """With a limit, the first ones."""
        assert isinstance(self.source, Corpus)
        tokenizer, texts = self.model.tokenizer, iter(self.source)
        try:
            limited = itertools.islice(texts, self.limit or None)
            while batch := list(itertools.islice(limited, ENCODED_AT_A_TIME)):
                for ids in tokenizer.encode_batch(batch):
                    yield np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)
        except ConfigError as error:
            raise _as_option(error) from error


@dataclass(frozen=True)
class OwnText:
    """The corpus that a run was trained on, opened when it is first used."""

    model: EvaluatedRun

    @cached_property
    def data(self) -> TextData:
        """The tokenised corpus, as for training; from the cache if it is there.

        Raises:
          ConfigError: the corpus is gone, or its tokenizer is not the run's any more.
        """
        model = self.model
        config = model.parts.config
        text = load_data(config.data, config.model.vocab_size, model.log)
        if text.tokenizer.backend.to_str() != model.tokenizer.backend.to_str():
            raise ConfigError(
                f"data.tokenizer={config.data.tokenizer!r} and data.corpus={config.data.corpus!r} no longer make the "
                f"tokenizer in {model.run_dir}: the file or the corpus has changed. Give the text with --corpus, "
                "which is read with the run's own tokenizer."
            )
        trained_on = model.corpus_sha256
        if trained_on and trained_on != text.corpus_sha256:
            model.warn_once(
                f"data.corpus={config.data.corpus!r} is not the text that {model.name} was trained on (sha256 "
                f"{text.corpus_sha256[:12]}, then {trained_on[:12]}): held-out documents may have been trained on."
            )
        return text


def open_documents(model: EvaluatedRun, shared: Shared, own: OwnText) -> Documents:
    """The documents of `shared.corpus`, or without one the documents that the run held out.

    Raises:
      ConfigError: the text cannot be read, or is empty.
    """
    if shared.corpus:
        config = DataConfig(corpus=shared.corpus, text_key=shared.text_key)
        try:
            sources = [corpus for corpus, _ in open_sources(config)]
            return Documents(shared.corpus, model, chained(shared.corpus, sources), shared.limit)
        except ConfigError as error:
            raise _as_option(error) from error
    corpus = model.parts.config.data.corpus
    return Documents(f"held out of {corpus}", model, own.data.validation.stream, shared.limit)


class Fingerprint:
    """A sha256 over documents of ids. Equal hashes: two evaluations scored the same tokens."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, ids: np.ndarray) -> None:
        self._digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, "<i4").tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _as_option(error: ConfigError) -> ConfigError:
    """The same error, with the names of the options of `engram-jax evaluate`."""
    return ConfigError(str(error).replace("data.corpus", "--corpus").replace("data.text_key", "--text_key"))
