"""`engram-jax import FOLDER RUN_DIR`: a run from a folder that `engram-jax export` wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from engram_jax.commands.command_line import exit_status, field_paths, parsed
from engram_jax.errors import FINISHED, RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """Makes a run from a folder that `engram-jax export` wrote: config.json, tokenizer.json, safetensors files.

    For example:
      engram-jax import exported/small runs/small_again

    The run can be sampled from, evaluated, and begun with (--train.init_from); it has no optimizer state to resume.
    """

    folder: tyro.conf.Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """The folder that `engram-jax export` wrote."""
    run_dir: tyro.conf.Positional[Annotated[Path, arg(metavar="RUN_DIR")]]
    """The run's folder to write; it must not exist yet."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    options = parsed(Options, arguments, "engram-jax import", field_paths)
    from engram_jax.interop.runs import import_run  # here, because it brings jax, which --help does not wait for

    try:
        import_run(options.folder, options.run_dir)
    except OSError as error:
        raise RunError(str(error)) from error
    return FINISHED
