"""Tokenizers: any `tokenizer.json`, or a byte-level BPE trained on the corpus and cached."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engram_jax.config import ConfigError, DataConfig, require
from engram_jax.data.cache import build_once, cache_key, cache_root
from engram_jax.data.corpora import Corpus

# The ids 0, 1, 2 are also DeepSeek's, so engram_pad_token_id=2 means the same with either tokenizer.
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
BAR = "\uff5c"  # DeepSeek's bar is the full-width one
BOS_NAMES = ("<|bos|>", f"<{BAR}begin▁of▁sentence{BAR}>", "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
EOS_NAMES = ("<|eos|>", f"<{BAR}end▁of▁sentence{BAR}>", "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
PAD_NAMES = ("<|pad|>", f"<{BAR}▁pad▁{BAR}>", "<pad>", "<|finetune_right_pad_id|>", "[PAD]", *EOS_NAMES)
# A BPE's merges are settled long before this much text, and its training time grows with it.
TRAINING_CHARACTERS = 100_000_000
TRAINING_BATCH = 256


class Tokenizer:
    """A `tokenizers.Tokenizer` with the few facts a language model needs about it.

    Document text that spells a special token (`<|eos|>`) is encoded as ordinary text, never as the token.

    Raises:
      ConfigError: it names no begin or end token by any of the usual names.
    """

    def __init__(self, backend: tokenizers.Tokenizer, sha256: str):
        self.backend = backend
        self.sha256 = sha256
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        ids = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.bos_id = _first_id(ids, BOS_NAMES)
        self.eos_id = _first_id(ids, EOS_NAMES)
        self.pad_id = _first_id(ids, PAD_NAMES)

    @cached_property
    def vocab_sha256(self) -> str:
        """Of tokens and ids: the same for every file that holds this tokenizer, whatever library version wrote it."""
        vocab = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def byte_lengths(self) -> np.ndarray:
        """int32 [vocab_size]: bytes of text each token stands for; 0 for special tokens and unused ids.

        Over a document's tokens they sum to its UTF-8 bytes (if the tokenizer does not normalise), which is what bits
        per byte divides by.

        Raises:
          ConfigError: the tokenizer does not keep its text (WordPiece and the like).
        """
        return self._byte_lengths.copy()

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        kinds = _decoder_kinds(json.loads(self.backend.to_str())["decoder"])
        if "ByteLevel" in kinds:
            length = len  # each character of a token is one byte
        elif kinds & {"Metaspace", "Replace", "ByteFallback"}:
            length = _sentencepiece_length
        else:
            raise ConfigError(f"data.tokenizer: decoder {sorted(kinds)} does not say which bytes a token stands for.")
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self.backend.get_vocab(with_added_tokens=False).items():
            lengths[token_id] = length(token)
        for token_id, added in self.backend.get_added_tokens_decoder().items():
            lengths[token_id] = 0 if added.special else len(added.content.encode())
        return lengths

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json` that `load_tokenizer` reads: whole, and only where there is another or none."""
        path, content = Path(path), self.backend.to_str()
        if path.is_file() and path.read_bytes() == content.encode():
            return
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      ConfigError: missing, or not a tokenizer.
    """
    try:
        content = Path(path).expanduser().read_bytes()
        backend = tokenizers.Tokenizer.from_str(content.decode())
    except OSError as error:
        raise ConfigError(f"data.tokenizer={str(path)!r}: cannot read it: {error.strerror}.") from error
    except Exception as error:  # tokenizers raises plain Exception for a file it does not understand
        raise ConfigError(f"data.tokenizer={str(path)!r} is not a tokenizer.json: {error}") from error
    return Tokenizer(backend, hashlib.sha256(content).hexdigest())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, special tokens first, every digit a token of its own.

    The result depends on the texts alone (at most the first `TRAINING_CHARACTERS` of them).

    Raises:
      ConfigError: the texts do not yield that many tokens, or `vocab_size` has no room for the 256 bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    require(
        vocab_size >= smallest,
        f"model.vocab_size={vocab_size} is below {smallest}, the least of a byte-level tokenizer.",
    )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_batches(texts), trainer)
    size = backend.get_vocab_size()
    require(
        size == vocab_size,
        f"model.vocab_size={vocab_size}: the corpus is so small that it yields only {size} tokens. "
        f"Set model.vocab_size={size} or less, or give more text.",
    )
    content = backend.to_str()
    return Tokenizer(backend, hashlib.sha256(content.encode()).hexdigest())


def tokenizer_for(config: DataConfig, vocab_size: int, corpus: Corpus, log: Callable[[str], None] = print) -> Tokenizer:
    """`config.tokenizer` if given; else a BPE of `vocab_size`, trained on the training split at first use and cached.

    Raises:
      ConfigError: the given tokenizer's size is not `vocab_size`, or the corpus is too small for it.
    """
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        require(
            tokenizer.vocab_size == vocab_size,
            f"model.vocab_size={vocab_size}, but data.tokenizer={config.tokenizer!r} has {tokenizer.vocab_size} "
            f"tokens: set model.vocab_size={tokenizer.vocab_size}.",
        )
        return tokenizer
    key = cache_key(
        kind="bpe 1",
        corpus=corpus.fingerprint,
        vocab_size=vocab_size,
        holdout_fraction=config.holdout_fraction,
    )

    def build(path: Path) -> None:
        log(f"Training a tokenizer of {vocab_size:,} tokens on {corpus.name} (once; cached).")
        train_tokenizer(corpus.training_documents(config.holdout_fraction), vocab_size).save(path)

    path = cache_root(config) / "tokenizers" / f"{key}.json"
    return load_tokenizer(build_once(path, _is_tokenizer, build, log))


def _is_tokenizer(path: Path) -> bool:
    """Whether a cached one can be used: a machine that lost power may have left an empty file."""
    try:
        load_tokenizer(path)
    except ConfigError:
        return False
    return True


def _first_id(ids: dict[str, int], names: Sequence[str]) -> int:
    for name in names:
        if name in ids:
            return ids[name]
    raise ConfigError(f"data.tokenizer: no token is called {', '.join(names)}; add one of them.")


def _decoder_kinds(decoder: dict | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(inner) for inner in decoder.get("decoders", ())))


def _sentencepiece_length(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("▁", " ").encode())


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    characters, texts = 0, iter(texts)
    while characters < TRAINING_CHARACTERS and (batch := list(itertools.islice(texts, TRAINING_BATCH))):
        characters += sum(map(len, batch))
        yield batch
