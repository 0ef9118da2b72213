"""Common and frequent words: RULER's two aggregation tasks."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from engram_jax.evaluation.ruler.items import Draft, Family
from engram_jax.evaluation.ruler.words import Texts, different, letters

NUM_COMMON = 10
SHORT = 4096
"""Below this length in tokens, RULER lets words occur less often, so that enough different words fit."""
ZIPF_ALPHA = 2.0
CODED_LETTERS = 6
TOKENS_PER_CODED_WORD = 50
"""The vocabulary of coded words has one word for every 50 tokens of the length."""
DOTS = "..."


def common_words(rng: Random, size: int, length: int, texts: Texts) -> Draft:
    """Common words extraction: a numbered list in which ten words occur 30 times each and all others 3 times.

    Below 4,096 tokens they occur 6 times and once. A worked example stands before the question: 40 different words, 10
    and 3 times (short: 20 words, 3 times and once). `size`: different words of the list.
    """
    is_short = length < SHORT
    shown = _word_list(rng, texts, *((20, 3, 1) if is_short else (40, 10, 3)))
    asked = _word_list(rng, texts, size, *((6, 1) if is_short else (30, 3)))
    example = f"{shown.input}{shown.answer_prefix} {_numbered(shown.outputs)}"
    return Draft(f"{example}\n{asked.input}", asked.answer_prefix, asked.outputs)


def _word_list(rng: Random, texts: Texts, size: int, common_times: int, other_times: int) -> Draft:
    words = rng.sample(texts.words, size)
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    entries = common * common_times + others * other_times
    rng.shuffle(entries)
    return Draft(
        input=(
            "This numbered list repeats some words more often than others. Remember those that come most often.\n"
            f"{_numbered(entries)}\nQuestion: Which {NUM_COMMON} words come most often in the list above?"
        ),
        answer_prefix=f" Answer: The {NUM_COMMON} words that come most often in the list are:",
        outputs=tuple(common),
    )


def _numbered(words) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def frequent_words(rng: Random, size: int, length: int, texts: Texts) -> Draft:
    """Frequent words extraction: made-up words whose frequencies follow a Zipf law of exponent 2.

    Rank 1 is dots, which count as noise. The question asks for ranks 2 to 4. The word of rank k occurs
    floor(size * k^-2 / zeta(2)) times. `size`: words of the text, before rounding down.
    """
    from scipy.special import zeta  # here, because it takes a while

    vocabulary = [DOTS, *different(lambda: letters(rng, ascii_lowercase, CODED_LETTERS), _vocabulary_size(length) - 1)]
    counts = [int(size * rank**-ZIPF_ALPHA / zeta(ZIPF_ALPHA)) for rank in range(1, len(vocabulary) + 1)]
    text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return Draft(
        input=(
            "This text is written in code. Keep track of how often each coded word occurs in it, to find the three "
            f"most frequent ones. {' '.join(text)}\nQuestion: Which three coded words are the most frequent in the "
            "text above? Leave out the dots '...' and explain nothing."
        ),
        answer_prefix=" Answer: The three most frequent coded words of the text above are:",
        outputs=tuple(vocabulary[1:4]),
    )


def _vocabulary_size(length: int) -> int:
    return max(length // TOKENS_PER_CODED_WORD, 5)


FAMILIES = (
    Family(
        "cwe",
        "cwe",
        120,
        common_words,
        smallest=2 * NUM_COMMON,
        largest=lambda texts: len(texts.words),
        settings={"num_cw": NUM_COMMON, "freq_cw": 30, "freq_ucw": 3, "below_4096": {"freq_cw": 6, "freq_ucw": 1}},
    ),
    # With 60 words the counts of ranks 2 to 5 are 9, 4, 2 and 1: the answer is unambiguous.
    Family("fwe", "fwe", 50, frequent_words, smallest=60, settings={"alpha": ZIPF_ALPHA, "coded_wordlen": 6}),
)
