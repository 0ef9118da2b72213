"""`engram-jax SUBCOMMAND ...`, the same as `python -m engram_jax SUBCOMMAND ...`: one name for each command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from engram_jax.commands.command_line import exit_status
from engram_jax.config import ConfigError, nearest, require
from engram_jax.errors import FINISHED
from engram_jax.version import __version__

SUBCOMMANDS = {
    "train": ("train", "Train a run that a Python file declares; the same command again resumes it."),
    "sample": ("sample", "Continue prompts with a trained run."),
    "evaluate": ("evaluate", "Measure perplexity, RULER, LongPPL or lm-eval tasks of trained runs."),
    "compare": ("compare", "Draw trained runs in one picture and one table."),
    "attach": ("attach", "Give a trained model a new memory and train only the memory."),
    "export": ("export", "Write a run as a Hugging Face folder of safetensors."),
    "import": ("import_run", "Make a run from a folder that `export` wrote."),
}
"""Name -> (module in engram_jax.commands, one line for --help). A module has `main(arguments) -> exit status`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the arguments name (default: the process's); returns its exit status (errors.py)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    while words and words[0] == "--with":
        file, words = words[1] if len(words) > 1 else "", words[2:]
        if status := exit_status(lambda file=file: _load(file)):
            return status
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in SUBCOMMANDS:
        return importlib.import_module(f"engram_jax.commands.{SUBCOMMANDS[name][0]}").main(rest)
    return exit_status(lambda: _other(name))


def _load(file: str) -> int:
    """Runs a file of the user's, for the variants that it registers."""
    from engram_jax.commands import user_file

    require(bool(file), "--with needs a Python file: engram-jax --with FILE.py SUBCOMMAND ...")
    user_file.load(file)
    return FINISHED


def _other(word: str) -> int:
    if word in ("-h", "--help"):
        print(usage())
        return FINISHED
    if word == "--version":
        print(f"engram_jax {__version__}")
        return FINISHED
    if word.startswith("-"):
        hint = nearest(word, ("--help", "--version", "--with"))
        raise ConfigError(f"there is no option {word!r}{hint or '; --help lists them all'}.")
    hint = nearest(word, SUBCOMMANDS) or f"; there are {', '.join(SUBCOMMANDS)}"
    raise ConfigError(f"there is no subcommand {word!r}{hint}.")


def usage() -> str:
    """What `--help` prints."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: engram-jax [--with FILE.py] SUBCOMMAND ...",
            "",
            "Language models with conditional memory (DeepSeek's Engram) in JAX: train, sample, evaluate, exchange.",
            "",
            *lines,
            "",
            "engram-jax SUBCOMMAND --help   what a subcommand does, an example, its options",
            "engram-jax --version           the installed version",
            "engram-jax --with FILE.py ...  first run a file that registers variants (engram_jax.registries),",
            "                               so that sample, evaluate and the others know those a run was trained with",
        ]
    )
