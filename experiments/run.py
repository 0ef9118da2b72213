"""Trains runs by name:  python -m experiments.run NAME [NAME ...] [--field value ...]

  --list                 all runs, one line each
  NAME --print           the resolved config, its parameters, FLOPs and bytes, then stop
  NAME --help            every field that can be overridden, with its default
  NAME --run_dir DIR     where checkpoints and metrics go (default runs/NAME); the same command again resumes
  NAME --train.steps 50  overrides a field; tuples are written 1 4, booleans True or False

Several names are trained one after the other, with the same overrides, and then compared (compare.png, compare.md).
The first is the baseline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from engram_jax.config import ConfigError, RunConfig, require, to_dict
from engram_jax.training.errors import RunError
from experiments.registry import RUNS, build, nearest


@dataclasses.dataclass(frozen=True)
class Options:
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")]
    print: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the resolved config, its parameters, FLOPs and bytes, and stop."""
    run_dir: Path | None = None
    """Where checkpoints and metrics go. Several runs: the folder that holds one folder each."""


def main(arguments: Sequence[str]) -> int:
    """Does what the command line `arguments` say; returns the exit status.

    Errors are one line each: 2 after a mistake in the arguments, 1 if a run cannot go on.
    """
    try:
        run(list(arguments))
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def run(arguments: list[str]) -> None:
    first_option = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, overrides = arguments[:first_option], arguments[first_option:]
    if not names and overrides == ["--list"]:
        width = max(map(len, RUNS))
        print("\n".join(f"{name:{width}}  {_doc(name).splitlines()[0]}" for name in RUNS))
        return
    if not names and (not overrides or overrides[0] in ("-h", "--help")):
        print(f"{(__doc__ or '').strip()}\n\nRuns: {', '.join(RUNS)}")
        return
    require(bool(names), f"the run's name comes first: NAME {' '.join(overrides)}")
    # All are parsed before the first is trained: a mistake in the last name should not surface hours later.
    parsed = {name: parse(build(name), overrides) for name in names}
    trained: list[Path] = []
    for name, options in parsed.items():
        if options.print:
            from engram_jax.counts import describe

            print(f"{json.dumps(to_dict(options.config), indent=2)}\n\n{describe(options.config)}")
        else:
            from engram_jax.training.loop import train

            given = options.run_dir
            trained.append(given if given and len(parsed) == 1 else (given or Path("runs")) / name)
            if train(options.config, trained[-1]).evaluation is None:
                return  # stopped by the user, who does not want the next run either
    if len(trained) > 1:
        from experiments.compare import compare

        print(f"Picture and table: {compare(trained)}")


def parse(config: RunConfig, overrides: Sequence[str]) -> Options:
    """The options, with `config` changed by the overrides.

    Raises:
      ConfigError: an unknown field, by the nearest known one, or a value that a config refuses.
      SystemExit: tyro's own, for --help and for values that do not fit their type.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            options, unknown = tyro.cli(
                Options,
                default=Options(config),
                args=list(overrides),
                prog=f"python -m experiments.run {config.name}",
                description=re.sub(r"(?<!\n)\n(?!\n)", "\n\n", _doc(config.name)),  # tyro joins single lines
                config=(tyro.conf.AvoidSubcommands,),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as exit:
        # tyro frames a config's own error in a box; the error itself, one line, is what led to the exit.
        cause: BaseException | None = exit
        while cause := cause.__context__:
            if isinstance(cause, ConfigError):
                raise cause from None
        print(messages.getvalue(), end="", file=sys.stderr)
        raise
    if unknown:
        word = unknown[0].split("=")[0]
        hint = nearest(word, [f"--{path}" for path in field_paths(config)])
        raise ConfigError(f"cannot make sense of {word!r}{hint or ' (names come before options)'}.")
    return options


def _doc(name: str) -> str:
    return inspect.getdoc(RUNS[name]) or ""


def field_paths(config: object, prefix: str = "") -> list[str]:
    """Dotted paths of all fields, `train.steps` among them."""
    paths = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        is_nested = dataclasses.is_dataclass(value)
        paths += field_paths(value, f"{prefix}{field.name}.") if is_nested else [prefix + field.name]
    return paths


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
