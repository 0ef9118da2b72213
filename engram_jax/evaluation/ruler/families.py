"""RULER's 13 tasks by name, and their 8 groups."""

from __future__ import annotations

from collections.abc import Sequence

from engram_jax.config import nearest, require
from engram_jax.evaluation.ruler import counting, needles, questions, tracing
from engram_jax.evaluation.ruler.items import Family

FAMILIES = {family.name: family for module in (needles, tracing, counting, questions) for family in module.FAMILIES}
GROUPS = tuple(dict.fromkeys(family.group for family in FAMILIES.values()))


def chosen(names: Sequence[str]) -> list[Family]:
    """The families with these names or groups (`niah_single`), in the usual order; all families without names.

    Raises:
      ConfigError: no such family; names the nearest one.
    """
    known = list(dict.fromkeys([*FAMILIES, *GROUPS]))
    for name in names:
        hint = nearest(name, known) or f"; there are {', '.join(known)}"
        require(name in known, f"ruler.families: there is no family {name!r}{hint}.")
    return [family for family in FAMILIES.values() if not names or {family.name, family.group} & set(names)]
