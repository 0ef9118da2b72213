"""The numbers of the paper's Tables 1 and 2 (arXiv:2601.07372), as reference columns.

The paper's models are a thousand times larger than the laptop's, and use another text and another tokenizer. The
numbers show what a memory is worth there; they are not a target for a small run. `ours` names the nearest metric of
this package. The paper does not say which accuracy of a benchmark it gives, nor how it prompted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

FILE = "paper_results.json"


@dataclass(frozen=True)
class PaperRow:
    """A row of a table of the paper."""

    name: str
    """The name as printed, with shots and metric."""
    values: tuple[float, ...]
    """One for each of the paper's models."""
    ours: tuple[str, ...]
    """Patterns `TASK/METRIC` (as for file names) of the same quantity here; the first that fits counts."""
    scale: float
    """Factor from our metric to the paper's unit (100 for percent)."""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    models: tuple[str, ...]
    rows: tuple[PaperRow, ...]


def paper_tables() -> tuple[PaperTable, ...]:
    """Tables 1 and 2."""
    content = json.loads(resources.files("engram_jax.evaluation").joinpath(FILE).read_text(encoding="utf-8"))
    return tuple(
        PaperTable(
            table["title"],
            tuple(table["models"]),
            tuple(
                PaperRow(row["name"], tuple(row["values"]), tuple(row.get("ours", ())), row.get("scale", 1.0))
                for row in table["rows"]
            ),
        )
        for table in content["tables"]
    )
