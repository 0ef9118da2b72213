"""Configs within configs: changed, written as JSON, read back, compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from engram_jax.config.run import RunConfig
from engram_jax.errors import nearest, require

T = TypeVar("T")

RENAMED = {"sight_every": "monitor_every"}
"""Former names of fields, as settings saved before 0.1.0 spell them."""


def replace(config: T, **changes: Any) -> T:
    """A copy of a config with some fields changed, also inside nested configs: `replace(run, train__steps=50)`.

    Raises:
      ConfigError: there is no such field (names the nearest), or a value that the config refuses.
    """
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for path, value in changes.items():
        head, _, rest = path.partition("__")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for head in (*nested, *flat):
        hint = nearest(head, fields) or f"; there are {', '.join(fields)}"
        require(head in fields, f"{type(config).__name__} has no field {head!r}{hint}.")
    for head, inner in nested.items():
        flat[head] = replace(getattr(config, head), **inner)
    return dataclasses.replace(config, **flat)  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Rebuilds a config from `to_dict`'s output; an unknown field raises `ConfigError`."""
    hints = get_type_hints(cls)
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    unknown = set(values) - set(hints)
    require(not unknown, f"{cls.__name__} has no field {', '.join(sorted(unknown))}: saved by another version?")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)


def differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """The leaves in which two configs differ, one line each: `train.steps: 50 here, 100 there`."""

    def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat = {}
        for key, value in values.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    a, b = flatten(to_dict(ours)), flatten(to_dict(theirs))
    return [f"{key}: {a.get(key)!r} here, {b.get(key)!r} there" for key in sorted(a | b) if a.get(key) != b.get(key)]
