"""Files that appear whole or not at all, also when several processes write the same one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. What is written there takes the place of `path` when the block ends.

    After an error `path` is as it was, and the temporary file is gone.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 atomically. Raises `OSError`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Writes indented JSON atomically. Raises `OSError`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Raises `OSError` if no file can be written at `path`; leaves nothing behind. For use before hours of work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with tempfile.TemporaryFile(dir=path.parent):
        pass
