"""Markdown tables whose columns line up when they are printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table: header, rule, rows. All rows have as many cells as the header."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines]


def bullets(sentences: Iterable[str]) -> list[str]:
    """A list with one sentence a line."""
    return [f"- {sentence}" for sentence in sentences]
