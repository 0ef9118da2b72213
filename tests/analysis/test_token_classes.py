"""Classes of hand-made sentences and source, read off by eye; tokens laid back onto their text."""

import numpy as np
import pytest

from engram_jax.analysis.token_classes import CLASSES, character_classes, spans, token_kinds
from engram_jax.data.tokenizer import train_tokenizer

SOURCE = """\
def area(radius=2.5):
    # The constant of Archimedes
    if radius in (0x1F, 3):
        return f"of {radius} by Euler"
"""
PROSE = "By the way, Alexander saw 24 horses in Macedonia. The UNO met; my_file is utf8."


def of(text, piece, nth=0):
    """The class of the nth occurrence of a piece of the text, which must have one class."""
    start = -1
    for _ in range(nth + 1):
        start = text.index(piece, start + 1)
    classes = set(character_classes(text)[start : start + len(piece)])
    assert len(classes) == 1, (piece, classes)
    return CLASSES[classes.pop()]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("By", "word"),
        ("way", "word"),
        (",", "punctuation"),
        ("Alexander", "name"),
        ("24", "number"),
        ("Macedonia", "name"),
        ("The", "word"),
        ("UNO", "name"),
        (";", "punctuation"),
        ("my_file", "identifier"),
        ("utf8", "identifier"),
        (" ", "space"),
    ],
)
def test_prose(piece, expected):
    assert of(PROSE, piece) == expected


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("def", "keyword"),
        ("area", "identifier"),
        ("(", "punctuation"),
        ("2.5", "number"),
        ("0x1F", "number"),
        ("The", "word"),
        ("Archimedes", "name"),
        ("return", "keyword"),
        ("of", "word"),
        ("Euler", "name"),
        ("\n", "newline"),
        ("    ", "space"),
    ],
)
def test_source(piece, expected):
    nth = SOURCE[: SOURCE.index('f"of')].count("of") if piece == "of" else 0
    assert of(SOURCE, piece, nth) == expected


def test_a_keyword_in_prose_is_a_word_and_source_that_does_not_parse_is_prose():
    assert of("we return to it, if at all", "return") == of("print 'x'\nreturn 3", "return") == "word"
    assert of("# we return\nx = 1\n", "return") == "word"


def test_a_name_after_a_wrapped_line_and_a_word_after_an_empty_one():
    assert of("seen by\nDarwin", "Darwin") == "name"
    assert of("seen by him\n\nDarwin", "Darwin") == "word"
    assert of('"""Compute it."""\nx = 1\n', "Compute") == "word"
    assert of("So said I to Don't.", "I") == "word"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SOURCE + PROSE + f"\nvalue_{i} = Archi{i}" for i in range(9)], 330)


TEXTS = [SOURCE, PROSE, "é漢😀 x = 'ß'\n", "\n\n  \n", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_the_text(tokenizer, text):
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    found, starts, ends = spans(tokenizer, ids)
    assert found == text and len(starts) == len(ids)
    assert (starts[0], ends[0]) == (0, 0) and (starts[-1], ends[-1]) == (len(text), len(text))
    for token, start, end in zip(ids[1:-1], starts[1:-1], ends[1:-1], strict=True):
        alone = tokenizer.decode([token])
        assert "\ufffd" in alone or text[start:end] == alone
        assert end > start
    covered = np.zeros(len(text), bool)
    for start, end in zip(starts, ends, strict=True):
        covered[start:end] = True
    assert covered.all()


def test_ids_that_are_no_text(tokenizer):
    """Half a character: each token by itself."""
    ids = tokenizer.encode("a漢")[:2]
    text, _, ends = spans(tokenizer, ids)
    assert text.startswith("a") and ends[-1] == len(text)
    assert len(token_kinds(tokenizer, ids).classes) == 2


def test_kinds_of_tokens(tokenizer):
    text = "def area(zzqq):\n    return 24\n"
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    kinds = token_kinds(tokenizer, ids)
    _, starts, ends = spans(tokenizer, ids)
    names = [CLASSES[c] for c in kinds.classes]
    assert names[0] == names[-1] == "end of document"

    def inside(piece):
        """Classes and places in the word of the tokens that begin in the piece, or with the blank before it."""
        begin = text.index(piece)
        firsts = [s + len(text[s:e]) - len(text[s:e].lstrip()) for s, e in zip(starts, ends, strict=True)]
        chosen = [t for t, first in enumerate(firsts) if begin <= first < min(begin + len(piece), ends[t])]
        return [names[t] for t in chosen], kinds.continues[chosen].tolist()

    for piece, expected in {
        "def": "keyword",
        "zzqq": "identifier",
        "return": "keyword",
        "24": "number",
        "(": "punctuation",
    }.items():
        classes, continues = inside(piece)
        assert classes and set(classes) == {expected}
        assert continues == [False] + [True] * (len(classes) - 1)
    assert len(inside("zzqq")[0]) > 1
    blank = [n for n, s, e in zip(names, starts, ends, strict=True) if e > s and not text[s:e].strip()]
    assert set(blank) <= {"newline", "space"} and "newline" in blank
