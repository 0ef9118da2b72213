"""What stops a run through no fault of the program: said in one message, with what to do next.

The exit statuses of `python -m experiments.run`, which whoever starts it again relies on:

    0    finished
    1    the run cannot go on (RunError), 2 wrong settings (ConfigError): somebody has to look
    75   stopped by SIGTERM, the notice before a preemption, and saved: start again
    130  stopped by Ctrl-C, and saved
    70   other processes are missing (PeersError), or the program failed (a full traceback): start again, later
    any other, death by a signal among them: start again, later
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FINISHED, FAILED, MISTAKEN, PEERS_LOST, TERMINATED, INTERRUPTED = 0, 1, 2, 70, 75, 130

GOES_ON = (
    "The same command on all processes continues from the last checkpoint, or begins again where there is none yet."
)


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field, its value and the remedy."""


class RunError(RuntimeError):
    """A run that cannot go on or be continued; the message is all the user needs to read."""


class PeersError(RuntimeError):
    """Other processes of the run are gone or did not come: to start again may help."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; the nearest is 'x'`, or nothing if none of the choices is close."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def missing_extra(package: str, extra: str) -> str:
    """The one way to say that a package of an optional extra is not installed."""
    return (
        f"{package} is not installed: it comes with the extra {extra!r}. In a clone: uv run --extra {extra} COMMAND; "
        f"from PyPI: pip install 'engram_jax[{extra}]'."
    )
