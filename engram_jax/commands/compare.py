"""`engram-jax compare RUN_DIR RUN_DIR ...`: trained runs in one picture and one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from engram_jax.commands.command_line import exit_status, field_paths, parsed
from engram_jax.comparison.report import compare
from engram_jax.errors import FINISHED


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares trained runs. Writes the picture compare.png and the table compare.md.

    engram-jax compare runs/moe_tiny runs/engram_tiny
    """

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs. The first run is the baseline. Runs that differ in nothing but their seeds form a group."""
    output: Path | None = None
    """Folder for picture and table. Default: the folder that holds the first run."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    options = parsed(Options, arguments, "engram-jax compare", field_paths)
    print(f"Picture and table: {compare(options.run_dirs, options.output)}")
    return FINISHED
