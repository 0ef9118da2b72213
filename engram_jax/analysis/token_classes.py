"""The class of each token: keyword, identifier, name, word, number, punctuation, white space.

Python's own tokenizer reads source that parses. Rules on words read strings, comments, and any other text. A token
takes the class of its first character that is not a space.

Legend: T tokens, C characters of the text.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import token as python_token
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engram_jax.data.tokenizer import Tokenizer

CLASSES = ("keyword", "identifier", "name", "word", "number", "punctuation", "newline", "space", "end of document")
KEYWORD, IDENTIFIER, NAME, WORD, NUMBER, PUNCTUATION, NEWLINE, SPACE, END = range(len(CLASSES))

PIECE = re.compile(r"(?P<word>\w+(?:['\u2019][^\W\d_]+)*)|(?P<space>\s+)|(?P<mark>[^\w\s]+)")
SENTENCE_ENDS = ".!?:"
OPENERS = "\"'`\u201c\u2018([{<#*-_"
"""Characters between the end of one sentence and the first word of the next."""


class TokenKinds(NamedTuple):
    classes: np.ndarray
    """uint8 [T]: index into CLASSES."""
    continues: np.ndarray
    """bool [T], whether the token begins inside a word."""


def token_kinds(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> TokenKinds:
    """Class of each token of a whole document; special tokens are `end of document`."""
    text, starts_T, ends_T = spans(tokenizer, ids)
    class_C, is_word_C = character_classes(text), np.array([c.isalnum() or c == "_" for c in text], bool)
    classes_T, continues_T = np.full(len(starts_T), END, np.uint8), np.zeros(len(starts_T), bool)
    for t, (start, end) in enumerate(zip(starts_T, ends_T, strict=True)):
        if start == end:
            continue
        first = next((i for i in range(start, end) if not text[i].isspace()), None)
        if first is None:
            classes_T[t] = NEWLINE if NEWLINE in class_C[start:end] else SPACE
            continue
        classes_T[t] = class_C[first]
        continues_T[t] = first == start > 0 and is_word_C[first] and is_word_C[first - 1]
    return TokenKinds(classes_T, continues_T)


def spans(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """The text, and where each token begins and ends in it: int64 [T] both, ends exclusive. Special tokens are empty.

    A token that is part of a character (of a byte-level tokenizer) spans the whole character.
    """
    ids = [int(i) for i in ids]
    text = tokenizer.decode(ids)
    lengths_T = tokenizer.byte_lengths()[ids].astype(np.int64)
    character_of_byte = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
    # SentencePiece's first token begins with a space that decoding drops.
    dropped = int(lengths_T.sum()) - len(character_of_byte)
    if dropped not in (0, 1):  # ids that are no text, such as half a character: each token by itself
        pieces = [tokenizer.decode([i]) for i in ids]
        ends_T = np.cumsum([len(piece) for piece in pieces])
        return "".join(pieces), ends_T - [len(piece) for piece in pieces], ends_T
    ends_T = np.maximum(np.cumsum(lengths_T) - dropped, 0)
    starts_T = np.maximum(ends_T - lengths_T, 0)
    bounds = np.append(character_of_byte, len(text))
    is_empty_T = starts_T == ends_T
    last_T = np.where(is_empty_T, bounds[starts_T], bounds[np.maximum(ends_T - 1, 0)] + 1)
    return text, bounds[starts_T], last_T


def character_classes(text: str) -> np.ndarray:
    """uint8 [C]: index into CLASSES, for each character."""
    class_C = _of_prose(text)
    for start, end, kind in _of_python(text):
        class_C[start:end] = _of_prose(text[start:end]) if kind == WORD else kind
    return class_C


def _of_prose(text: str) -> np.ndarray:
    class_C = np.full(len(text), PUNCTUATION, np.uint8)
    for match in PIECE.finditer(text):
        piece, (start, end) = match.group(), match.span()
        if match.lastgroup == "word":
            class_C[start:end] = _of_word(piece, _begins_sentence(text, start))
        elif match.lastgroup == "space":
            class_C[start:end] = [NEWLINE if c in "\r\n" else SPACE for c in piece]
    return class_C


def _of_word(word: str, begins_sentence: bool) -> int:
    if word[0].isdigit():
        return NUMBER
    if "_" in word or any(c.isdigit() for c in word) or re.search("[a-z][A-Z]", word):
        return IDENTIFIER
    is_acronym = len(word) > 1 and word.isupper()
    return NAME if is_acronym or (word[0].isupper() and len(word) > 1 and not begins_sentence) else WORD


def _begins_sentence(text: str, start: int) -> bool:
    """Whether a word here has a capital because it begins a sentence."""
    newlines = 0
    while start > 0 and (text[start - 1].isspace() or text[start - 1] in OPENERS):
        start -= 1
        newlines += text[start] == "\n"
    return start == 0 or text[start - 1] in SENTENCE_ENDS or newlines > 1


def _of_python(text: str) -> Iterator[tuple[int, int, int]]:
    """Beginnings and ends of Python's own tokens, and their classes: WORD for strings and comments; nothing for other
    text.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the text's strings
            ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def offset(position: tuple[int, int]) -> int:
        return line_starts[min(position[0], len(line_starts)) - 1] + position[1]

    # From Python 3.12 on an f-string is several tokens; it is one string here, as before.
    f_string, depth = 0, 0
    for item in tokens:
        name, start, end = python_token.tok_name[item.type], offset(item.start), offset(item.end)
        if name in ("FSTRING_START", "TSTRING_START"):
            f_string, depth = (f_string if depth else start), depth + 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if not depth:
                yield f_string, end, WORD
        elif depth:
            continue
        elif name in ("STRING", "COMMENT"):
            yield start, end, WORD
        elif name == "NAME":
            yield start, end, KEYWORD if keyword.iskeyword(item.string) else IDENTIFIER
        elif name in ("NUMBER", "OP"):
            yield start, end, NUMBER if name == "NUMBER" else PUNCTUATION
