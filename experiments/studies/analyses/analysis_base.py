"""Studies that analyse the finished runs of `pair`, and train nothing of their own.

An analysis is a package beside this file. Its `__init__.py` declares the study with `analysis`; its modules do the
work. They bring jax and Matplotlib, so they are imported when the study runs, not for `--list`:

    measure.py   measure(runs) -> Measured       what is measured in the runs
    report.py    report(measured) -> lines       report.md, from the numbers
                 rows(measured) -> dicts         results.jsonl, one line each
                 from_rows(rows) -> Measured     optional: so that `--results FILE` needs no runs
    picture.py   draw(measured, folder)          the pictures
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError
from experiments.studies.analyses.raw_numbers import write_rows
from experiments.studies.engine.declared import FinishedRun, Study
from experiments.studies.trained.pair import PAIR


@dataclasses.dataclass(frozen=True)
class PackagedAnalysis:
    """The analysis whose modules are in `package`."""

    package: str

    def of_runs(self, runs: Sequence[FinishedRun], folder: Path) -> list[str]:
        """Measures the runs, writes results.jsonl and pictures to `folder`, and returns the lines of the report."""
        measured = self._module("measure").measure(runs)
        write_rows(folder / "results.jsonl", self._module("report").rows(measured))
        return self._told(measured, folder)

    def of_rows(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
        """The same from the lines of a results.jsonl, without the runs.

        Raises:
          ConfigError: this analysis needs the runs.
          KeyError, ValueError, TypeError: the rows are not those of this analysis.
        """
        report = self._module("report")
        if not hasattr(report, "from_rows"):
            name = self.package.rpartition(".")[2]
            raise ConfigError(f"--results: {name} needs the runs themselves. Leave --results out.")
        measured = report.from_rows(rows)
        write_rows(folder / "results.jsonl", rows)
        return self._told(measured, folder)

    def _told(self, measured: Any, folder: Path) -> list[str]:
        self._module("picture").draw(measured, folder)
        return self._module("report").report(measured)

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")


def analysis(package: str, question: str, caveats: tuple[str, ...]) -> Study:
    """The study that analyses the runs of `pair`.

    Args:
      package: `__name__` of the analysis's package; its last part is the study's name.
    """
    name = package.rpartition(".")[2]
    return dataclasses.replace(
        PAIR, name=name, question=question, caveats=caveats, analysis=PackagedAnalysis(package), trained_in=PAIR.name
    )
