"""`engram-jax SUBCOMMAND ...`, the same as `python -m engram_jax SUBCOMMAND ...`: one name for each command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from engram_jax.commands.command_line import exit_status
from engram_jax.config import ConfigError, nearest
from engram_jax.errors import FINISHED

SUBCOMMANDS = {
    "train": ("train", "Train a run that a Python file declares; the same command again resumes it."),
    "attach": ("attach", "Give a trained model a new memory and train only that."),
    "sample": ("sample", "Continue prompts with a trained run."),
    "evaluate": ("evaluate", "Measure perplexity, RULER, LongPPL or lm-eval tasks of trained runs."),
    "compare": ("compare", "Draw trained runs in one picture and one table."),
    "export": ("export", "Write a run as a Hugging Face folder of safetensors."),
    "import": ("import_run", "Make a run of a folder that `export` wrote."),
}
"""Name -> (module in engram_jax.commands, one line for --help). A module has `main(arguments) -> exit status`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the arguments name (default: those of the process); returns its exit status."""
    return run(list(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in SUBCOMMANDS:
        return importlib.import_module(f"engram_jax.commands.{SUBCOMMANDS[name][0]}").main(rest)
    return exit_status(lambda: _other(name))


def _other(word: str) -> int:
    if word in ("-h", "--help"):
        print(usage())
        return FINISHED
    if word == "--version":
        from engram_jax.version import __version__

        print(f"engram_jax {__version__}")
        return FINISHED
    raise ConfigError(f"there is no subcommand {word!r}{nearest(word, SUBCOMMANDS) or '; --help lists them all'}.")


def usage() -> str:
    """What `--help` prints."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: engram-jax SUBCOMMAND ...",
            "",
            "Language models with conditional memory (DeepSeek's Engram) in JAX: train, sample, evaluate, exchange.",
            "",
            *lines,
            "",
            "engram-jax SUBCOMMAND --help   the options of a subcommand",
            "engram-jax --version           the installed version",
        ]
    )
