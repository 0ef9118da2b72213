"""The registry of declared runs. A run is a function that returns a complete RunConfig; --list shows its docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from engram_jax.config import ConfigError, RunConfig, nearest, replace

RUNS: dict[str, Callable[[], RunConfig]] = {}
FAMILIES: list[Callable[[str], Callable[[], RunConfig] | None]] = []
"""Functions that make a run from a name of their family (ladder.py), which has too many names to list. They return None
for other names."""


def register(run: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Decorator: makes the function a run under its own name."""
    RUNS[run.__name__] = run
    return run


def find(name: str) -> Callable[[], RunConfig]:
    """The function that returns the run of that name.

    Raises:
      ConfigError: no such run; the message has the nearest name.
    """
    if name in RUNS:
        return RUNS[name]
    for family in FAMILIES:
        if (run := family(name)) is not None:
            return run
    raise ConfigError(f"there is no run {name!r}{nearest(name, RUNS) or '; --list prints all runs'}.")


def build(name: str) -> RunConfig:
    """The run of that name, with its `name` set.

    Raises:
      ConfigError: no such run; the message has the nearest name.
    """
    return replace(find(name)(), name=name)


def about(name: str) -> str:
    """The run's docstring."""
    return inspect.getdoc(find(name)) or ""


def list_of_runs() -> str:
    """All runs, one line each: name and first line of the docstring."""
    width = max(map(len, RUNS))
    return "\n".join(f"{name:{width}}  {about(name).splitlines()[0]}" for name in RUNS)
