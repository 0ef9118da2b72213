"""The options of every command that trains: a run's settings from the command line, its `--print`, its start."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from engram_jax.commands.command_line import field_paths, keep_compiled_programs, parsed
from engram_jax.config import ConfigError, RunConfig, to_dict
from engram_jax.errors import FINISHED


@dataclasses.dataclass(frozen=True)
class Options:
    """What a command that trains is told of one run."""

    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")]
    print: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the resolved config, its parameters, FLOPs and bytes, and stop."""
    run_dir: Path | None = None
    """Folder for checkpoints and metrics; the same folder again resumes. Default: runs/NAME. With several runs: the
    folder that holds one folder for each."""
    slice: str = ""
    """TPU slice to lay the run out for, v5p-64 (chips) or v5p:4x4x4: sets the mesh axes and the parts of a batch."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Trace a few steps and write where their time goes: profile/summary.md in the run's folder."""
    coordinator: str = ""
    """HOST:PORT of process 0. TPU slices, GKE and Slurm are detected and need none."""
    num_processes: int | None = None
    """With --coordinator: how many processes train together, 1 or more."""
    process_id: int | None = None
    """With --coordinator: the number of this process, from 0."""


def take_slice(overrides: list[str]) -> tuple[list[str], Callable[[RunConfig], RunConfig]]:
    """The other overrides, and what `--slice` makes of a run before they apply.

    Raises:
      ConfigError: there is no such slice.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--slice")
    try:
        options, rest = parser.parse_known_args(overrides)
    except argparse.ArgumentError:
        raise ConfigError("--slice needs the name of a TPU slice, for example v5p-64.") from None
    if options.slice is None:
        return rest, lambda run: run
    from engram_jax.aot.chips import topology
    from engram_jax.aot.slices import laid_out

    where = topology(options.slice)
    return rest, lambda run: laid_out(run, where)


def train(options: Options, run_dir: Path) -> int:
    """Trains one run; returns FINISHED or the status of what stopped it."""
    from engram_jax import distributed
    from engram_jax.training import loop

    distributed.start(options.coordinator, options.num_processes, options.process_id)
    keep_compiled_programs(options.config)
    return loop.train(options.config, run_dir, profile=options.profile).status


def parse(config: RunConfig, overrides: Sequence[str], command: str, about: str) -> Options:
    """The options, with `config` changed by the overrides.

    Args:
      command, about: what `--help` calls the run, and what it says of it.

    Raises:
      ConfigError: an unknown field (names the nearest), or a value that a config refuses.
      SystemExit: after --help, or after one line about a value that does not fit its type.
    """
    return parsed(
        Options,
        overrides,
        command,
        lambda _: [*field_paths(config), *(field.name for field in dataclasses.fields(Options)[1:])],
        "; names come before options, and --help lists all options",
        default=Options(config),
        description=re.sub(r"(?<!\n)\n(?!\n)", "\n\n", about),  # tyro joins single lines
    )


def show(config: RunConfig) -> None:
    """Prints the settings, parameters, FLOPs and bytes of a run."""
    from engram_jax.counts import describe

    print(f"{json.dumps(to_dict(config), indent=2)}\n\n{describe(config)}")


def train_all(runs: Mapping[str, Options]) -> int:
    """Trains (or prints) runs by name, one after the other, and compares them; returns the exit status.

    A run goes to `--run_dir`, several to a folder each in it; default `runs/NAME`.
    """
    trained: list[Path] = []
    for name, options in runs.items():
        if options.print:
            show(options.config)
            continue
        given = options.run_dir
        trained.append(given if given and len(runs) == 1 else (given or Path("runs")) / name)
        if status := train(options, trained[-1]):
            return status  # stopped by somebody who does not want the next run either
    if len(trained) > 1:
        from engram_jax.comparison.report import compare
        from engram_jax.distributed import is_first

        if is_first():
            print(f"Picture and table: {compare(trained)}")
    return FINISHED
