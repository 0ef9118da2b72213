"""A run from a folder that engram_jax.commands.export wrote:  engram-jax import FOLDER RUN_DIR"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from engram_jax.commands.command_line import exit_status
from engram_jax.errors import FINISHED, RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """Makes a run, to sample from, evaluate or train on, of config.json, tokenizer.json and safetensors files."""

    folder: tyro.conf.Positional[Path]
    """As engram-jax export wrote it."""
    run_dir: tyro.conf.Positional[Path]
    """A new folder."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    options = tyro.cli(Options, args=arguments, prog="engram-jax import", use_underscores=True)
    from engram_jax.interop.runs import import_run  # here, because it brings jax, which --help does not wait for

    try:
        import_run(options.folder, options.run_dir)
    except OSError as error:
        raise RunError(str(error)) from error
    return FINISHED
