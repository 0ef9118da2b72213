"""A run as a Hugging Face folder of safetensors:  python -m experiments.export RUN_DIR FOLDER [--dtype bfloat16]

The way back is experiments.import_run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from engram_jax.config import ConfigError


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
    """Returns the exit status: 2 after a mistake in the arguments, 1 if the run cannot be read."""
    options = tyro.cli(Options, args=list(arguments), prog="python -m experiments.export", use_underscores=True)
    # Here, because they bring jax, which --help does not wait for.
    from engram_jax.interop.runs import export_run
    from engram_jax.memory.table_index import TableFileError
    from engram_jax.training.errors import RunError

    try:
        export_run(options.run_dir, options.folder, options.dtype)
    except (ConfigError, RunError, TableFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
