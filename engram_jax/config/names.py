"""Types of settings that name a variant: `Literal`s of what `engram_jax.registries` holds at the moment they are read.

Settings are annotated `placement: names.Placement`. The annotation is evaluated when a setting is checked or shown in
`--help`, so a variant that another package registered counts like our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from engram_jax import registries

if TYPE_CHECKING:
    Attention = Placement = Reader = RowOptimizer = str
else:
    _REGISTRIES = {
        "Attention": registries.ATTENTION,
        "Placement": registries.PLACEMENTS,
        "Reader": registries.READERS,
        "RowOptimizer": registries.ROW_OPTIMIZERS,
    }

    def __getattr__(name: str) -> Any:
        if name not in _REGISTRIES:
            raise AttributeError(name)
        return Literal[tuple(_REGISTRIES[name])]
