"""`engram-jax compare RUN_DIR RUN_DIR ...`: trained runs in one picture and one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from engram_jax.commands.command_line import exit_status
from engram_jax.comparison.report import compare
from engram_jax.errors import FINISHED


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares trained runs; writes compare.png and compare.md."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Runs' folders, as experiments.run wrote them. The first one is the baseline; seeds of one run form a group."""
    output: Path | None = None
    """Where picture and table go (default: the folder that holds the first run)."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    options = tyro.cli(Options, args=arguments, prog="engram-jax compare", use_underscores=True)
    print(f"Picture and table: {compare(options.run_dirs, options.output)}")
    return FINISHED
