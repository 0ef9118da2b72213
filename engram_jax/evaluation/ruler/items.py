"""RULER items: a text and a question, made as long as the evaluation asks.

RULER (Hsieh et al. 2024, arXiv 2404.06654; github.com/NVIDIA/RULER) asks for answers that stand in a long text, the
haystack. Families, their settings, answer budgets and scores here are the published ones. The wording of the
instructions, the word lists and the haystacks are made here, so scores compare only with scores of this package. For
scores that compare with published ones, give `ruler.data` the files that RULER's own scripts wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from engram_jax.config import ConfigError
from engram_jax.data.tokenizer import Tokenizer
from engram_jax.evaluation.ruler.words import Texts

SLACK = 0.01
"""The haystack stops growing when the item is within this share of the wanted length."""
REDRAWS = 20
"""How often an item is drawn again if its smallest form does not fit."""


class DoesNotFitError(ConfigError):
    """A family has no item this short. `least`: the tokens that its shortest item needs."""

    def __init__(self, family: str, length: int, least: int):
        super().__init__(f"ruler: {family} needs about {least:,} tokens with this tokenizer, not {length:,}.")
        self.least = least


class Draft(NamedTuple):
    """The text of an item."""

    input: str
    """Instruction, haystack and question."""
    answer_prefix: str
    """How the answer begins; the model goes on from there."""
    outputs: tuple[str, ...]
    """The right answers. `Family.match` says whether all of them are wanted or any one."""


@dataclass(frozen=True)
class Item:
    """A drafted item with its lengths in tokens. Field names are those of RULER's own JSONL files."""

    index: int
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    length: int
    """Tokens of bos, input, answer prefix and answer budget."""
    tokens_to_generate: int
    """Tokens that the answer may have."""

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix


@dataclass(frozen=True)
class Family:
    """One of RULER's tasks."""

    name: str
    group: str
    """Its name in tables of papers, which report RULER's 13 tasks in 8 groups."""
    tokens_to_generate: int
    """RULER's answer budget. An item gets more if the run's tokenizer needs more for the right answer."""
    build: Callable[[Random, int, int, Texts], Draft]
    """Makes an item from random numbers, a haystack size in the family's units, a length in tokens, and texts."""
    match: str = "all"
    """The score (scoring.py): `all`, the share of the answers found, or `part`, 100 if any answer is found."""
    smallest: int = 1
    """Smallest haystack size at which the question makes sense."""
    largest: Callable[[Texts], int | None] = lambda texts: None
    """Haystack size at which the texts are used up; None: never."""
    settings: dict[str, object] = field(default_factory=dict)
    """The published numbers, for the results file."""


def make_items(family: Family, tokenizer: Tokenizer, length: int, count: int, seed: int, texts: Texts) -> list[Item]:
    """Items of at most `length` tokens, answer budget included. Item i depends only on i and the other arguments.

    Raises:
      DoesNotFitError: the family has no item that short.
    """
    return [_make_item(family, tokenizer, length, index, seed, texts) for index in range(count)]


def _make_item(family: Family, tokenizer: Tokenizer, length: int, index: int, seed: int, texts: Texts) -> Item:
    least = 0
    for attempt in range(REDRAWS):
        key = f"{seed} {family.name} {length} {index} {attempt}"

        def item_of(size: int, key: str = key) -> Item:
            draft = family.build(Random(key), size, length, texts)
            budget = answer_budget(family, tokenizer, draft.outputs)
            tokens = 1 + len(tokenizer.encode(draft.input + draft.answer_prefix)) + budget
            return Item(index, draft.input, draft.answer_prefix, draft.outputs, tokens, budget)

        item = largest_that_fits(item_of, length, family.smallest, family.largest(texts))
        if item.length <= length:
            return item
        least = min(least or item.length, item.length)
    raise DoesNotFitError(family.name, length, least)


def answer_budget(family: Family, tokenizer: Tokenizer, outputs: tuple[str, ...]) -> int:
    """Tokens for the answer: RULER's number, or the number that the right answer needs, if that is more."""
    wanted = [", ".join(outputs)] if family.match == "all" else outputs
    return max(family.tokens_to_generate, *(len(tokenizer.encode(" " + answer)) for answer in wanted))


def largest_that_fits(item_of: Callable[[int], Item], length: int, smallest: int, largest: int | None) -> Item:
    """The item of the largest size with at most `length` tokens, by binary search; the smallest item if none fits.

    The length may not grow with every step of the size, so the returned item was itself measured.
    """
    best = item_of(smallest)
    low, high = smallest, None if largest is None else largest + 1
    while best.length <= length * (1 - SLACK) and (high is None or high - low > 1):
        # Doubling first, also below a known end: items of the largest size may take far longer to make.
        size = 2 * low if high is None or 2 * low < high else (low + high) // 2
        item = item_of(size)
        if item.length <= length:
            low = size
            best = max(best, item, key=lambda i: i.length)
        else:
            high = size
    return best
