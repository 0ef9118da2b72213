"""Trains runs by name:  python -m experiments.run NAME [NAME ...] [--field value ...]

  --list                 all runs, one line each
  NAME --print           the resolved config, its parameters, FLOPs and bytes, then stop
  NAME --help            every field that can be overridden, with its default
  NAME --run_dir DIR     where checkpoints and metrics go (default runs/NAME); the same command again resumes
  NAME --train.steps 50  overrides a field; tuples are written 1 4, booleans True or False
  NAME --slice v5p-64    lays the run out for that TPU slice (chips): mesh axes and sequences at a time
  NAME --profile         traces a few steps and writes what they took to DIR/profile/summary.md

On several hosts the same command runs on each: TPU slices, GKE and Slurm are found, elsewhere it takes
--coordinator HOST:PORT --num_processes N --process_id I. DIR must then be a folder that all of them share.

Several names are trained one after the other, with the same overrides, and then compared (compare.png, compare.md).
The first is the baseline.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from engram_jax.commands.command_line import training_status
from engram_jax.commands.run_options import parse, take_slice, train_all
from engram_jax.config import require
from engram_jax.errors import FINISHED
from experiments.runs.registry import RUNS, build, find


def main(arguments: Sequence[str]) -> int:
    """Does what the command line `arguments` say; returns the exit status (errors.py).

    Errors are one line each.
    """
    return training_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    first_option = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, overrides = arguments[:first_option], arguments[first_option:]
    if not names and overrides == ["--list"]:
        width = max(map(len, RUNS))
        print("\n".join(f"{name:{width}}  {_doc(name).splitlines()[0]}" for name in RUNS))
        return FINISHED
    if not names and (not overrides or overrides[0] in ("-h", "--help")):
        print(f"{(__doc__ or '').strip()}\n\nRuns: {', '.join(RUNS)}")
        return FINISHED
    require(bool(names), f"the run's name comes first: NAME {' '.join(overrides)}")
    # All are parsed before the first is trained: a mistake in the last name should not surface hours later.
    overrides, where = take_slice(overrides)
    command = "python -m experiments.run"
    return train_all({name: parse(where(build(name)), overrides, f"{command} {name}", _doc(name)) for name in names})


def _doc(name: str) -> str:
    return inspect.getdoc(find(name)) or ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
