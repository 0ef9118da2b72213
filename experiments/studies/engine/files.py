"""Files of a study are written whole, whoever else writes the same ones meanwhile."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file of this process's own to write to, which takes the place of `path` at the end."""
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield own
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as own:
        own.write_text(text, encoding="utf-8")
