"""What every config does with a setting that cannot work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field, its value and the remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_literals(config: Any) -> None:
    """Raises if a field annotated `Literal[...]`, or `tuple[Literal[...], ...]`, holds something else (tyro checks the
    command line, not Python)."""
    for name, hint in get_type_hints(type(config)).items():
        value, values = getattr(config, name), (getattr(config, name),)
        if get_origin(hint) is tuple:
            hint, values = get_args(hint)[0], value
        if get_origin(hint) is Literal:
            allowed = get_args(hint)
            wrong = [v for v in values if v not in allowed]
            require(not wrong, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; the nearest is 'x'`, or nothing if none of the choices is close."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""
