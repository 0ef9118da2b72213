"""Trains declared runs, one after the other:  python -m experiments.run NAME [NAME ...] [--field value ...]

  moe_tiny engram_tiny   for example: train both runs, then compare them
  --list                 print all runs, one line each
  NAME --print           print the run's settings, parameters, FLOPs and bytes, then stop
  NAME --help            print every field that can be changed, with its default
  NAME --run_dir DIR     the folder for checkpoints and metrics (default runs/NAME); the same command again resumes
  NAME --train.steps 50  change a field; tuples are written 1 4, booleans True or False
  NAME --slice v5p-64    set mesh axes and batch parts for that TPU slice (64 chips)
  NAME --profile         trace a few steps and write their times to DIR/profile/summary.md

Several names: every run gets the same changes. After the last run, all are compared (compare.png, compare.md). The
first run is the baseline.

Several hosts: run the same command on each. TPU slices, GKE and Slurm are detected; otherwise pass
--coordinator HOST:PORT --num_processes N --process_id I. DIR must be a folder that all hosts share.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engram_jax.commands.command_line import training_status
from engram_jax.commands.run_options import parse, take_slice, train_all
from engram_jax.config import require
from engram_jax.errors import FINISHED
from experiments.runs.registry import about, build, list_of_runs


def main(arguments: Sequence[str]) -> int:
    """Runs the command line `arguments`; returns the exit status (errors.py). An error is one line."""
    return training_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    first_option = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, overrides = arguments[:first_option], arguments[first_option:]
    if not names and overrides == ["--list"]:
        print(list_of_runs())
        return FINISHED
    if not names and (not overrides or overrides[0] in ("-h", "--help")):
        print((__doc__ or "").strip())
        return FINISHED
    require(bool(names), f"the run's name comes first. Write NAME {' '.join(overrides)}; --list prints the names.")
    # All are parsed before the first is trained: a mistake in the last name should not surface hours later.
    overrides, where = take_slice(overrides)
    command = "python -m experiments.run"
    return train_all({name: parse(where(build(name)), overrides, f"{command} {name}", about(name)) for name in names})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
