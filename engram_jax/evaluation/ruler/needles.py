"""Needles in a haystack: RULER's eight retrieval tasks.

A needle is a sentence that gives a value for a key. The haystack is noise, running text, or other needles of the same
form. The settings are those of RULER's synthetic.yaml.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random
from typing import Literal

from engram_jax.evaluation.ruler.items import Draft, Family
from engram_jax.evaluation.ruler.words import NOISE, Texts, compound_key, different, number, uuid4

DEPTHS = 40
"""RULER places needles at 40 evenly spaced depths of running text."""
Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    haystack: Literal["noise", "essay", "needle"]
    keys: Kind
    values: Kind
    num_keys: int = 1
    """Hidden keys. Keys that the question does not ask for are distractors."""
    num_values: int = 1
    """Values of each key."""
    num_queries: int = 1
    """Keys that the question asks for."""

    def build(self, rng: Random, size: int, length: int, texts: Texts) -> Draft:
        """An item. `size`: lines of noise, words of text, or distracting needles."""
        keys = different(lambda: draw(rng, self.keys, texts), self.num_keys)
        values = different(lambda: draw(rng, self.values, texts), self.num_keys * self.num_values)
        values_of = {key: values[i * self.num_values : (i + 1) * self.num_values] for i, key in enumerate(keys)}
        needles = [self.sentence(key, value) for key in keys for value in values_of[key]]
        rng.shuffle(needles)
        if self.haystack == "essay":
            context = " ".join(at_depths(rng, texts.passage(rng, size), needles))
        else:
            lines = [NOISE] * size if self.haystack == "noise" else self.distractors(rng, size, keys, texts)
            context = "\n".join(at_random(rng, lines, needles))
        asked = rng.sample(keys, self.num_queries)
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + " and " + asked[-1]
        one = self.num_queries * self.num_values == 1
        what = f"special {self.noun}" if one else f"special {self.values}"
        return Draft(
            input=(
                f"Hidden in the text below {'is one ' if one else 'are '}{what}. Remember {'it' if one else 'them'}: "
                f"the question at the end asks for {'it' if one else 'them'}.\n{context}\n"
                f"Question: What {'is' if one else 'are all'} the {what} for {query} in the text above?"
            ),
            answer_prefix=f" Answer: The {what} for {query} in the text above {'is' if one else 'are'}",
            outputs=tuple(value for key in asked for value in values_of[key]),
        )

    @property
    def noun(self) -> str:
        return self.values.removesuffix("s")

    def sentence(self, key: str, value: str) -> str:
        return f"One special {self.noun} for {key} is {value}."

    def distractors(self, rng: Random, size: int, keys: list[str], texts: Texts) -> list[str]:
        """Needles for other keys."""
        others: list[str] = []
        while len(others) < size:
            key = draw(rng, self.keys, texts)
            if key not in keys:
                others.append(self.sentence(key, draw(rng, self.values, texts)))
        return others


def draw(rng: Random, kind: Kind, texts: Texts) -> str:
    if kind == "words":
        return compound_key(rng, texts)
    return number(rng) if kind == "numbers" else uuid4(rng)


def at_depths(rng: Random, sentences: list[str], needles: list[str]) -> list[str]:
    """Sentences with the needles between them, each at its own of the 40 depths from beginning to end."""
    depths = sorted(rng.sample(range(DEPTHS), len(needles)))
    places = [len(sentences) * depth // (DEPTHS - 1) for depth in depths]
    return inserted(sentences, needles, places)


def at_random(rng: Random, lines: list[str], needles: list[str]) -> list[str]:
    """Lines with the needles between them, at random places, in their order."""
    gaps = range(len(lines) + 1)
    places = rng.sample(gaps, len(needles)) if len(needles) <= len(gaps) else rng.choices(gaps, k=len(needles))
    return inserted(lines, needles, sorted(places))


def inserted(lines: list[str], needles: list[str], places: list[int]) -> list[str]:
    """Lines with needle i before line `places[i]`; places ascend."""
    result, start = [], 0
    for needle, place in zip(needles, places, strict=True):
        result += [*lines[start:place], needle]
        start = place
    return result + lines[start:]


def _family(name: str, group: str, needles: Needles) -> Family:
    return Family(name, group, 128, needles.build, settings=asdict(needles))


FAMILIES = (
    _family("niah_single_1", "niah_single", Needles("noise", "words", "numbers")),
    _family("niah_single_2", "niah_single", Needles("essay", "words", "numbers")),
    _family("niah_single_3", "niah_single", Needles("essay", "words", "uuids")),
    _family("niah_multikey_1", "niah_multikey", Needles("essay", "words", "numbers", num_keys=4)),
    _family("niah_multikey_2", "niah_multikey", Needles("needle", "words", "numbers")),
    _family("niah_multikey_3", "niah_multikey", Needles("needle", "uuids", "uuids")),
    _family("niah_multivalue", "niah_multivalue", Needles("essay", "words", "numbers", num_values=4)),
    _family("niah_multiquery", "niah_multiquery", Needles("essay", "words", "numbers", num_keys=4, num_queries=4)),
)
