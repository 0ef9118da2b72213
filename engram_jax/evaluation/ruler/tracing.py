"""Variable tracking: RULER's multi-hop task.

A number is assigned to a variable and handed on from variable to variable, in the right order but scattered over
noise. The question asks for every variable that holds the number. As in RULER, a worked example stands before it.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random
from string import ascii_uppercase

from engram_jax.evaluation.ruler.items import Draft, Family
from engram_jax.evaluation.ruler.needles import at_random
from engram_jax.evaluation.ruler.words import NOISE, Texts, different, letters

CHAINS, HOPS = 1, 4
NAME_LETTERS, EXAMPLE_LETTERS = 5, 3
EXAMPLE_SHARE = 8
"""The example has 1/8 of the question's noise, but at most 15 lines (RULER: an example of up to 500 tokens)."""
EXAMPLE_LINES = 15


def build(rng: Random, size: int, length: int, texts: Texts, chains: int = CHAINS, hops: int = HOPS) -> Draft:
    """An item. `size`: lines of noise. The first chain's variables are the answers; further chains distract."""
    shown = question(rng, min(size // EXAMPLE_SHARE, EXAMPLE_LINES), EXAMPLE_LETTERS, chains, hops)
    asked = question(rng, size, NAME_LETTERS, chains, hops)
    example = f"{shown.input}{shown.answer_prefix} {' '.join(shown.outputs)}"
    return Draft(f"{example}\n\n{asked.input}", asked.answer_prefix, asked.outputs)


def question(rng: Random, size: int, name_letters: int, chains: int, hops: int) -> Draft:
    names = different(lambda: letters(rng, ascii_uppercase, name_letters), chains * (hops + 1))
    numbers = different(lambda: str(rng.randrange(10_000, 100_000)), chains)
    lines = [NOISE] * size
    for chain, number in enumerate(numbers):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        assignments = [f"VAR {own[0]} = {number}", *(f"VAR {new} = VAR {old}" for old, new in pairwise(own))]
        lines = at_random(rng, lines, assignments)
    text = "\n".join(lines)
    return Draft(
        input=(
            f"Follow the chains of variable assignments that are hidden in this text.\n\n{text}\n"
            f"Question: Which variables hold the value {numbers[0]} in the text above?"
        ),
        answer_prefix=f" Answer: By the assignments above, these {hops + 1} variables hold the value {numbers[0]}:",
        outputs=tuple(names[: hops + 1]),
    )


FAMILIES = (Family("vt", "vt", 30, build, smallest=HOPS + 1, settings={"num_chains": CHAINS, "num_hops": HOPS}),)
