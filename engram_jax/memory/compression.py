"""Tokenizer compression: raw token id -> canonical id, so that "The", " the" and "THE" share their n-grams.

The memory hashes canonical ids; the backbone reads raw ids (paper 2.2, appendix C). A canonical id is the rank of a
token's normalized text, in order of first appearance. Every hash multiplier depends on the number of canonical ids.

Shapes: V raw token ids, ... any batch shape.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from engram_jax.config import ConfigError, EngramConfig, require

# A private-use character carries a lone space past Strip, which would otherwise empty it.
_LONE_SPACE = "\ue000"
# Hugging Face's own normalizers: a Python port with `unicodedata` gave 119 different keys on a 129,280-entry vocabulary
# (there accents are all of category M*, lower-casing is per character, and the Unicode tables have another version).
_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(_LONE_SPACE, " "),
    ]
)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Canonical id of every raw token id. Equal and hashed by content, so it may be a static jit argument.

    Attributes:
      canonical_ids: int32 [V], read-only; every value from 0 to size - 1 occurs.
    """

    canonical_ids: np.ndarray

    def __post_init__(self):
        ids = np.array(self.canonical_ids, np.int32)
        require(
            ids.ndim == 1 and len(ids) > 0 and np.array_equal(np.unique(ids), np.arange(ids.max() + 1)),
            "canonical_ids must be a non-empty vector in which every id from 0 to its maximum occurs.",
        )
        ids.setflags(write=False)
        object.__setattr__(self, "canonical_ids", ids)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer | str | os.PathLike[str]) -> TokenMap:
        """The published compression of a tokenizer.

        Args:
          tokenizer: the tokenizer, or the path of its `tokenizer.json`. Ids that it does not use count as empty text,
            as in the published code.

        Raises:
          ConfigError: the file is missing or is not a tokenizer.
        """
        source = tokenizer if isinstance(tokenizer, Tokenizer) else _load(os.fspath(tokenizer))
        vocabulary = source.get_vocab(with_added_tokens=True)
        require(bool(vocabulary), "The tokenizer has no tokens: train it, or give another tokenizer.json.")
        ranks: dict[str, int] = {}
        ids = range(max(vocabulary.values()) + 1)
        return cls(np.array([ranks.setdefault(_key(source, i), len(ranks)) for i in ids]))

    @classmethod
    def identity(cls, vocab_size: int) -> TokenMap:
        """The map without compression: raw ids are hashed (qwen_ple, and models without a text tokenizer)."""
        return cls(np.arange(vocab_size))

    @property
    def vocab_size(self) -> int:
        """Number of raw token ids, V."""
        return len(self.canonical_ids)

    @cached_property
    def size(self) -> int:
        """Number of canonical ids, V'."""
        return int(self.canonical_ids.max()) + 1

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical ids as little-endian int64, in hexadecimal digits."""
        return hashlib.sha256(self.canonical_ids.astype("<i8").tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenMap) and (self.size, self.sha256) == (other.size, other.sha256)

    def __hash__(self) -> int:
        return hash((self.size, self.sha256))

    def check(self, config: EngramConfig, vocab_size: int) -> None:
        """Raises `ConfigError` unless the map's sizes are those of the config and the model (`vocab_size` raw ids)."""
        require(
            self.vocab_size == vocab_size,
            f"The tokenizer has {self.vocab_size} token ids, but model.vocab_size={vocab_size}: "
            f"set model.vocab_size={self.vocab_size} or give the model's own tokenizer.",
        )
        expected = config.engram_compressed_vocab_size
        require(
            expected in (0, self.size),
            f"The tokenizer compresses to {self.size} ids, but engram_compressed_vocab_size={expected}: every hash "
            f"depends on this number. Give the tokenizer the config was made for, or set it to 0 for a new model.",
        )


def _load(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception for a missing and for a malformed file
        raise ConfigError(f"tokenizer={path!r} cannot be read ({error}): give the path of a tokenizer.json.") from None


def _key(tokenizer: Tokenizer, token_id: int) -> str:
    """The normalized text of a token: tokens with equal keys share a canonical id."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\ufffd" in text:  # part of a UTF-8 character, without text to normalize: the raw piece is the key
        return tokenizer.id_to_token(token_id) or text
    return _NORMALIZER.normalize_str(text) or text


def canonicalize_numpy(token_map: TokenMap, token_ids: np.ndarray) -> np.ndarray:
    """Canonical ids int32 [...] of raw ids [...]. Negative ids (blocked) stay; ids from V on become -1 (blocked)."""
    raw = np.asarray(token_ids).astype(np.int64)
    inside = (raw >= 0) & (raw < token_map.vocab_size)
    mapped = token_map.canonical_ids[np.where(inside, raw, 0)]
    return np.where(inside, mapped, np.clip(raw, -(2**31), -1)).astype(np.int32)
