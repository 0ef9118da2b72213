"""The names of all runs. A run is a function that returns a complete RunConfig; its docstring is what --list shows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from engram_jax.config import ConfigError, RunConfig, replace

RUNS: dict[str, Callable[[], RunConfig]] = {}


def register(run: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Decorator: makes the function a run under its own name."""
    RUNS[run.__name__] = run
    return run


def build(name: str) -> RunConfig:
    """The run of that name, its `name` set.

    Raises:
      ConfigError: no such run; names the nearest.
    """
    if name not in RUNS:
        raise ConfigError(f"there is no run {name!r}{nearest(name, RUNS) or '; --list shows them all'}.")
    return replace(RUNS[name](), name=name)


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; the nearest is 'x'`, or nothing if none of the choices is close."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""
