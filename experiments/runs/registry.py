"""The names of all runs. A run is a function that returns a complete RunConfig; its docstring is what --list shows."""

from __future__ import annotations

from collections.abc import Callable

from engram_jax.config import ConfigError, RunConfig, nearest, replace

RUNS: dict[str, Callable[[], RunConfig]] = {}
FAMILIES: list[Callable[[str], Callable[[], RunConfig] | None]] = []
"""Functions that make a run from its name alone (ladder.py): too many to list. None: not of this family."""


def register(run: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Decorator: makes the function a run under its own name."""
    RUNS[run.__name__] = run
    return run


def find(name: str) -> Callable[[], RunConfig]:
    """The function that returns the run of that name.

    Raises:
      ConfigError: no such run; names the nearest.
    """
    if name in RUNS:
        return RUNS[name]
    for family in FAMILIES:
        if (run := family(name)) is not None:
            return run
    raise ConfigError(f"there is no run {name!r}{nearest(name, RUNS) or '; --list shows them all'}.")


def build(name: str) -> RunConfig:
    """The run of that name, its `name` set.

    Raises:
      ConfigError: no such run; names the nearest.
    """
    return replace(find(name)(), name=name)
