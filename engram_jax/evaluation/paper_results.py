"""The figures of the paper's Tables 1 and 2 (arXiv:2601.07372), as reference columns.

They were measured on models a thousand times the size of the laptop's, on other text and with another tokenizer: they
show what a memory is worth there and are no target for a small run. `ours` names the metric of this package that comes
nearest; the paper does not say which of a benchmark's several accuracies it gives, nor how it was prompted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

FILE = "paper_results.json"


@dataclass(frozen=True)
class PaperRow:
    name: str
    """As printed, with shots and metric."""
    values: tuple[float, ...]
    ours: tuple[str, ...]
    """Patterns `TASK/METRIC` (as file names are matched) for the same quantity here; the first that fits counts."""
    scale: float
    """What our metric is multiplied by to be in the paper's unit (100 for percent)."""


@dataclass(frozen=True)
class PaperTable:
    title: str
    models: tuple[str, ...]
    rows: tuple[PaperRow, ...]


def paper_tables() -> tuple[PaperTable, ...]:
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
