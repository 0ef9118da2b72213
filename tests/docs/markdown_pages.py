"""The project's pages as tests read them: code blocks with their place, commands, links.

A block of Python that shall be executed has a comment in the line above it, which no reader sees:

    <!-- run: NAME -->

Blocks of one page with the same NAME run one after the other and share their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tpu" / "README.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
RUN = re.compile(r"<!-- run: ([\w-]+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: str
    """Path of the page, from the root of the repository."""
    line: int
    """Of the page, of the block's first line of text; counts from 1."""
    language: str
    text: str
    run: str
    """NAME of the comment above the block; empty without one."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, also those in lists."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        begin = FENCE.match(lines[number])
        number += 1
        if not begin:
            continue
        first = number
        while number < len(lines) and lines[number].strip() != begin["fence"]:
            number += 1
        assert number < len(lines), f"{name_of(page)}:{first}: the code block has no end"
        indent = len(begin["indent"])
        text = "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines[first:number])
        run = RUN.fullmatch(lines[first - 2].strip()) if first > 1 else None
        info = begin["info"].split()
        found.append(Block(name_of(page), first + 1, info[0] if info else "", text + "\n", run[1] if run else ""))
        number += 1
    return found


def prose(page: Path) -> str:
    """The page's text with its code blocks blanked, so that lines keep their numbers."""
    lines, inside = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = FENCE.match(line)
        if inside:
            inside = "" if line.strip() == inside else inside
            lines.append("")
        elif fence:
            inside = fence["fence"]
            lines.append("")
        else:
            lines.append(line)
    return "\n".join(lines)
