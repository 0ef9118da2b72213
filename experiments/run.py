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

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from engram_jax.config import RunConfig, require, to_dict
from engram_jax.training.errors import FINISHED
from experiments.command_line import field_paths, keep_compiled_programs, parsed, training_status
from experiments.registry import RUNS, build, find


@dataclasses.dataclass(frozen=True)
class Options:
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")]
    print: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the resolved config, its parameters, FLOPs and bytes, and stop."""
    run_dir: Path | None = None
    """Where checkpoints and metrics go. Several runs: the folder that holds one folder each."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Trace a few steps and write a page about them: profile/summary.md in the run's folder."""
    coordinator: str = ""
    """HOST:PORT of process 0. Needed only where the processes are not found: not on TPU slices, GKE and Slurm."""
    num_processes: int | None = None
    """With coordinator: how many processes train together."""
    process_id: int | None = None
    """With coordinator: which of them this is, from 0."""


def main(arguments: Sequence[str]) -> int:
    """Does what the command line `arguments` say; returns the exit status (training/errors.py).

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
    parsed = {name: parse(where(build(name)), overrides) for name in names}
    trained: list[Path] = []
    for name, options in parsed.items():
        if options.print:
            from engram_jax.counts import describe

            print(f"{json.dumps(to_dict(options.config), indent=2)}\n\n{describe(options.config)}")
        else:
            given = options.run_dir
            trained.append(given if given and len(parsed) == 1 else (given or Path("runs")) / name)
            if status := train(options, trained[-1]):
                return status  # stopped by somebody who does not want the next run either
    if len(trained) > 1:
        from engram_jax.training.distributed import is_first
        from experiments.compare import compare

        if is_first():
            print(f"Picture and table: {compare(trained)}")
    return FINISHED


def take_slice(overrides: list[str]) -> tuple[list[str], Callable[[RunConfig], RunConfig]]:
    """The other overrides, and what `--slice` makes of a run before they apply."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--slice")
    options, rest = parser.parse_known_args(overrides)
    if options.slice is None:
        return rest, lambda run: run
    from engram_jax.aot.chips import topology
    from experiments.slices import laid_out

    where = topology(options.slice)
    return rest, lambda run: laid_out(run, where)


def train(options: Options, run_dir: Path) -> int:
    """Trains one run; returns FINISHED or the status of what stopped it."""
    from engram_jax.training import distributed, loop

    distributed.start(options.coordinator, options.num_processes, options.process_id)
    keep_compiled_programs(options.config)
    return loop.train(options.config, run_dir, profile=options.profile).status


def parse(config: RunConfig, overrides: Sequence[str], command: str = "", about: str = "") -> Options:
    """The options, with `config` changed by the overrides. `command` and `about` are what --help calls a run that is
    not registered.

    Raises:
      ConfigError: an unknown field, by the nearest known one, or a value that a config refuses.
      SystemExit: tyro's own, for --help and for values that do not fit their type.
    """
    return parsed(
        Options,
        overrides,
        command or f"python -m experiments.run {config.name}",
        lambda _: field_paths(config),
        " (names come before options)",
        default=Options(config),
        description=re.sub(r"(?<!\n)\n(?!\n)", "\n\n", about or _doc(config.name)),  # tyro joins single lines
    )


def _doc(name: str) -> str:
    return inspect.getdoc(find(name)) or ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
