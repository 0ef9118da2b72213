"""The variants that settings can name: row optimizers, placements, attention, readers, evaluation tasks.

A variant is one new file and one line here:

    PLACEMENTS = Registry("placement", {..., "mine": "engram_jax.memory.placements.mine:MyPlacement"})

Other packages add variants without touching this one, by an entry point or by a call before settings are built:

    [project.entry-points."engram_jax.placements"]
    mine = "their_package.placement:MyPlacement"

    PLACEMENTS.register("mine", MyPlacement)

A name is known before its module is imported, so that `--help` and the checks of settings need no jax. Settings are
annotated with `engram_jax.config.names`, which reads the names from here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from engram_jax.errors import ConfigError, nearest

T = TypeVar("T")


def load(path: str) -> Any:
    """The object that "module:attribute" names; imports the module."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Mapping[str, T], Generic[T]):
    """Variants by name, in the order in which `--help` lists them; a module is imported when its variant is used."""

    def __init__(self, what: str, group: str, entries: Mapping[str, str]):
        """
        Args:
          what: the noun for error messages, "placement".
          group: entry points of `engram_jax.GROUP` in other packages are variants too.
          entries: name -> "module:attribute".
        """
        self.what, self.group = what, f"engram_jax.{group}"
        self._entries: dict[str, Any] = dict(entries)

    def register(self, name: str, variant: T) -> T:
        """Adds a variant under a new name; returns it.

        Raises:
          ConfigError: another variant has that name.
        """
        known = self._entries.get(name) or self._installed.get(name)
        if known is not None and known is not variant:
            raise ConfigError(f"there is a {self.what} {name!r} already: choose another name.")
        self._entries[name] = variant
        return variant

    def unregister(self, name: str) -> None:
        """Takes back what `register` added."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        """The variant of that name.

        Raises:
          ConfigError: there is none (names the nearest), or its package cannot be imported.
        """
        if name not in self._entries and name in self._installed:
            try:
                self._entries[name] = self._installed[name].load()
            except (ImportError, AttributeError) as error:
                package = self._installed[name].value
                raise ConfigError(f"the {self.what} {name!r} ({package}) cannot be imported: {error}.") from None
        if name not in self._entries:
            hint = nearest(name, self) or f"; there are {', '.join(self)}"
            raise ConfigError(f"there is no {self.what} {name!r}{hint}.")
        if isinstance(self._entries[name], str):
            self._entries[name] = load(self._entries[name])
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._entries, *self._installed]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


ROW_OPTIMIZERS: Registry[Any] = Registry(
    "row optimizer",
    "row_optimizers",
    {
        "catch_up_adam": "engram_jax.memory.row_optimizers.adam:CatchUpAdam",
        "dense_adam": "engram_jax.memory.row_optimizers.adam:DenseAdam",
        "lazy_adam": "engram_jax.memory.row_optimizers.lazy_adam:LazyAdam",
        "rowwise_adagrad": "engram_jax.memory.row_optimizers.rowwise:RowwiseAdagrad",
        "rowwise_rmsprop": "engram_jax.memory.row_optimizers.rowwise:RowwiseRMSprop",
        "sinkhorn": "engram_jax.memory.row_optimizers.sinkhorn:SinkhornMomentum",
        "frozen": "engram_jax.memory.row_optimizers.frozen:FrozenRows",
    },
)
"""`optimizer.table_optimizer`: how the rows of the tables move (memory/row_optimizers/base.py)."""

PLACEMENTS: Registry[Any] = Registry(
    "placement",
    "placements",
    {
        "device": "engram_jax.memory.placements.device:DevicePlacement",
        "host": "engram_jax.memory.placements.host:HostPlacement",
        "tiered": "engram_jax.memory.placements.tiered:TieredPlacement",
        "numpy": "engram_jax.memory.placements.numpy_arrays:NumpyPlacement",
    },
)
"""`memory.placement`: which memory holds the tables (memory/placements/base.py)."""

ATTENTION: Registry[Any] = Registry(
    "kind of attention",
    "attention",
    {"mla": "engram_jax.variants.mla:VARIANT", "gqa": "engram_jax.variants.gqa:VARIANT"},
)
"""`model.attention.kind`: how tokens see earlier tokens (variants/attention.py)."""

READERS: Registry[Any] = Registry(
    "reader",
    "readers",
    {
        "paper": "engram_jax.variants.engram:PAPER",
        "deepseek_v41": "engram_jax.variants.engram:DEEPSEEK_V41",
        "qwen_ple": "engram_jax.variants.engram:QWEN_PLE",
        "over_encoding": "engram_jax.variants.over_encoding:VARIANT",
    },
)
"""`model.engram.engram_variant`: how table rows change the residual streams (variants/readers.py)."""

HASHES: Registry[Any] = Registry(
    "hash",
    "hashes",
    {
        "deepseek": "engram_jax.memory.hashing:DEEPSEEK",
        "qwen": "engram_jax.memory.hashing:QWEN",
        "over_encoding": "engram_jax.memory.hashing:OVER_ENCODING",
    },
)
"""How n-grams become rows, by the name in a reader's `hash` (memory/hashing.py)."""

TASKS: Registry[Any] = Registry(
    "task",
    "tasks",
    {
        "perplexity": "engram_jax.evaluation.corpus_perplexity:Perplexity",
        "longppl": "engram_jax.evaluation.long_ppl:LongPPL",
        "ruler": "engram_jax.evaluation.ruler.task:Ruler",
        "lm_eval": "engram_jax.evaluation.lm_eval_task:LmEval",
    },
)
"""`engram-jax evaluate --tasks`: what is measured on a trained run (evaluation/tasks.py)."""
