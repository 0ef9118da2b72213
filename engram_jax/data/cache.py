"""Derived files (tokenizers, token streams): built once per file system, never seen half-written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError, DataConfig


def cache_root(config: DataConfig) -> Path:
    """`data.cache_dir`, else $ENGRAM_CACHE, else ~/.cache/engram_jax."""
    return Path(config.cache_dir or os.environ.get("ENGRAM_CACHE") or "~/.cache/engram_jax").expanduser()


def cache_key(**what: Any) -> str:
    """A short name for everything the cached file is a function of."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def build_once(
    path: Path, is_complete: Callable[[Path], bool], build: Callable[[Path], None], log: Callable[[str], None] = print
) -> Path:
    """Returns `path`, a file or folder, after building it if it is missing or incomplete.

    `build(partial)` writes to a name beside it that is renamed when whole. Processes that share the file system take
    turns by a lock that dies with its holder: the first one builds, the others wait and find it done. Hosts with disks
    of their own build their own copy.

    Raises:
      ConfigError: the cache cannot be written (full disk, no permission).
    """
    if is_complete(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock"), log):
            if not is_complete(path):
                partial = path.with_name(f"{path.name}.partial")
                _remove(partial)
                build(partial)
                _remove(path)
                os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: cannot write {error.filename or path}: {error.strerror or error}. "
            "Free space there, or point data.cache_dir (or $ENGRAM_CACHE) to another place."
        ) from error
    return path


@contextlib.contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"Another process is building {path.with_suffix('')}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
