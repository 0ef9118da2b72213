"""RULER's 13 tasks by name, and their 8 groups."""

from __future__ import annotations

from collections.abc import Sequence

from engram_jax.config import ConfigError
from engram_jax.evaluation.ruler import counting, needles, questions, tracing
from engram_jax.evaluation.ruler.items import Family
from engram_jax.evaluation.tasks import unknown_name

FAMILIES = {family.name: family for module in (needles, tracing, counting, questions) for family in module.FAMILIES}
GROUPS = tuple(dict.fromkeys(family.group for family in FAMILIES.values()))


def chosen(names: Sequence[str]) -> list[Family]:
    """The families of these names or groups (`niah_single`), in the usual order; all of them without names.

    Raises:
      ConfigError: no such family; names the nearest ones.
    """
    for name in names:
        if name not in FAMILIES and name not in GROUPS:
            raise ConfigError(
                f"ruler.families: {unknown_name('family', name, list(dict.fromkeys([*FAMILIES, *GROUPS])))}"
            )
    return [family for family in FAMILIES.values() if not names or {family.name, family.group} & set(names)]
