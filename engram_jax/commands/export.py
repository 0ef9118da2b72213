"""A run as a Hugging Face folder of safetensors:  engram-jax export RUN_DIR FOLDER [--dtype bfloat16]

The way back is engram_jax.commands.import_run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from engram_jax.commands.command_line import exit_status
from engram_jax.errors import FINISHED, RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes a run's newest checkpoint as config.json, tokenizer.json and safetensors files (docs/interchange.md)."""

    run_dir: tyro.conf.Positional[Path]
    """A run's folder, as experiments.run wrote it."""
    folder: tyro.conf.Positional[Path]
    """A new folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 is exact; bfloat16 is half the size."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    options = tyro.cli(Options, args=arguments, prog="engram-jax export", use_underscores=True)
    # Here, because they bring jax, which --help does not wait for.
    from engram_jax.interop.runs import export_run
    from engram_jax.memory.table_index import TableFileError

    try:
        export_run(options.run_dir, options.folder, options.dtype)
    except (TableFileError, OSError) as error:
        raise RunError(str(error)) from error
    return FINISHED
