"""Checks that every config makes of itself."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from engram_jax.errors import nearest, require


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
            hint = nearest(str(wrong[0]), map(str, allowed)) if wrong else ""
            require(not wrong, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{hint}.")
