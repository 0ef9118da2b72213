"""`engram-jax export RUN_DIR FOLDER`: a run as a Hugging Face folder of safetensors. import_run.py is the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from engram_jax.commands.command_line import exit_status, field_paths, parsed
from engram_jax.errors import FINISHED, RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes a run's newest checkpoint as a Hugging Face folder: config.json, tokenizer.json, safetensors files.

    For example:
      engram-jax export runs/small exported/small --dtype bfloat16

    `engram-jax import` is the way back. The optimizer's state is not exported.
    """

    run_dir: tyro.conf.Positional[Annotated[Path, arg(metavar="RUN_DIR")]]
    """The run's folder."""
    folder: tyro.conf.Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """The folder to write; it must not exist yet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the numbers in the files: float32 is exact, bfloat16 takes half the bytes."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    options = parsed(Options, arguments, "engram-jax export", field_paths)
    # Here, because they bring jax, which --help does not wait for.
    from engram_jax.interop.runs import export_run
    from engram_jax.memory.table_index import TableFileError

    try:
        export_run(options.run_dir, options.folder, options.dtype)
    except (TableFileError, OSError) as error:
        raise RunError(str(error)) from error
    return FINISHED
