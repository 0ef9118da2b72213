"""A run from a folder that experiments.export wrote:  python -m experiments.import_run FOLDER RUN_DIR"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from engram_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
    """Makes a run, to sample from, evaluate or train on, of config.json, tokenizer.json and safetensors files."""

    folder: tyro.conf.Positional[Path]
    """As experiments.export wrote it."""
    run_dir: tyro.conf.Positional[Path]
    """A new folder."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 after a mistake in the arguments, 1 if the folder cannot be read."""
    options = tyro.cli(Options, args=list(arguments), prog="python -m experiments.import_run", use_underscores=True)
    # Here, because they bring jax, which --help does not wait for.
    from engram_jax.interop.runs import import_run
    from engram_jax.training.errors import RunError

    try:
        import_run(options.folder, options.run_dir)
    except (ConfigError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
