"""What every config does with a setting that cannot work."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field, its value and the remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_literals(config: Any) -> None:
    """Raises if a field annotated `Literal[...]` holds something else (tyro checks the command line, not Python)."""
    for name, hint in get_type_hints(type(config)).items():
        if getattr(hint, "__origin__", None) is Literal:
            value, allowed = getattr(config, name), get_args(hint)
            require(value in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
