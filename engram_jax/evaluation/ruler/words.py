"""Material for items: sentences of real text, a list of words, random numbers and ids, noise."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from random import Random

from engram_jax.config import require
from engram_jax.evaluation.ruler.question_files import QuestionSet

NOISE = "Rain falls on the hill. The river is wide. The lamp is lit. Off they go. Far out and home again."
"""Five sentences without information, which are repeated: the easiest haystack."""
LEAST_WORDS = 8_000
"""Fewest words in the list; RULER's word list (wonderwords) has about as many."""
MAX_CHARACTERS = 4_000_000
"""Characters of text that are read for haystacks; 128k tokens take about half a million."""
SENTENCE_END = re.compile(r"\n\s*\n|(?<=[.!?])\s+|(?<=[。！？])")  # noqa: RUF001  (no space follows the latter)
WORD = re.compile(r"\b[a-z]{4,10}\b")


@dataclass(frozen=True)
class Texts:
    """The texts from which an evaluation makes its items."""

    sentences: tuple[str, ...]
    """Sentences of the haystack, in order, without line breaks."""
    squad: QuestionSet | None = None
    hotpot: QuestionSet | None = None

    @classmethod
    def of(cls, documents: Iterable[str], **question_sets: QuestionSet | None) -> Texts:
        """Texts from the first 4 million characters of the documents.

        Raises:
          ConfigError: there is no text.
        """
        sentences, characters = [], 0
        for document in documents:
            pieces = (" ".join(piece.split()) for piece in SENTENCE_END.split(document))
            sentences += [piece for piece in pieces if piece]
            characters += len(document)
            if characters >= MAX_CHARACTERS:
                break
        require(bool(sentences), "ruler: the documents for the haystack hold no text; name others with ruler.essays.")
        return cls(tuple(sentences), **question_sets)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Different lower-case words of 4 to 10 letters: the haystack's, and made-up words if there are few."""
        found = {word for sentence in self.sentences for word in WORD.findall(sentence)}
        rng = Random("words")
        while len(found) < LEAST_WORDS:
            found.add(made_up_word(rng))
        return tuple(sorted(found))

    def passage(self, rng: Random, num_words: int) -> list[str]:
        """Consecutive sentences with `num_words` words in all, from a random sentence on. The last one may be cut.

        RULER's items all take the beginning of its essays; here items take different text. As in RULER, the text starts
        again at its end.
        """
        chosen, start = [], rng.randrange(len(self.sentences))
        for sentence in itertools.islice(itertools.cycle(self.sentences), start, None):
            if num_words <= 0:
                break
            words = sentence.split()[:num_words]
            chosen.append(" ".join(words))
            num_words -= len(words)
        return chosen


def made_up_word(rng: Random, syllables: int = 3) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def compound_key(rng: Random, texts: Texts) -> str:
    """Two words with a hyphen, like RULER's adjective and noun."""
    return "-".join(rng.sample(texts.words, 2))


def number(rng: Random) -> str:
    """A number of seven digits."""
    return str(rng.randrange(10**6, 10**7))


def uuid4(rng: Random) -> str:
    """A random UUID of version 4 (RFC 9562) in its usual form of 36 characters."""
    digits = f"{rng.getrandbits(128):032x}"
    digits = digits[:12] + "4" + digits[13:16] + rng.choice("89ab") + digits[17:]
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def letters(rng: Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def different(draw, count: int) -> list[str]:
    """`count` different values of `draw()`."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[draw()] = None
    return list(values)
