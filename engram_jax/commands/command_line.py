"""Options from the command line, with one line for every mistake; what all commands that train or compute share."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import tyro

from engram_jax.commands.platforms import leave_out_libtpu
from engram_jax.config import ConfigError, RunConfig, nearest
from engram_jax.errors import FAILED, GOES_ON, INTERRUPTED, MISTAKEN, PEERS_LOST, PeersError, RunError

T = TypeVar("T")

NOBODY_READS = 141
"""The exit status behind `| head` once that has read enough: a shell's for SIGPIPE, 128 + 13."""


def exit_status(command: Callable[[], int]) -> int:
    """What the command returns. A mistake, or a run that cannot go on, is told in one line (errors.py)."""
    leave_out_libtpu()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKEN if isinstance(error, ConfigError) else FAILED
    except BrokenPipeError:
        return nobody_reads()


def training_status(command: Callable[[], int]) -> int:
    """`exit_status` of what trains, alone or among other processes, where the end of one becomes the end of all.

    A program's own error is printed whole and counts as something that may pass: whoever started it tries again.
    """
    leave_out_libtpu()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except (ConfigError, RunError) as error:
        status, together = MISTAKEN if isinstance(error, ConfigError) else FAILED, True
        print(f"error: {error}", file=sys.stderr)
    except PeersError as error:
        status, together = PEERS_LOST, False
        print(f"error: {error}", file=sys.stderr)
    except BaseException as error:
        alone = "jax" not in sys.modules or not _among_others()
        if alone and isinstance(error, BrokenPipeError):
            return nobody_reads()
        if alone and not isinstance(error, Exception):
            raise
        status, together = INTERRUPTED if isinstance(error, KeyboardInterrupt) else PEERS_LOST, False
        traceback.print_exc()
        if alone:
            return status
        print(
            "error: this process ends, and with it the others, within a minute. If the lines above speak of a "
            "connection or a peer, another process died first. " + GOES_ON,
            file=sys.stderr,
        )
    if "jax" in sys.modules and _among_others():
        from engram_jax.distributed import leave

        leave(status, together)
    return status


def _among_others() -> bool:
    import jax

    return jax.distributed.is_initialized()


def nobody_reads() -> int:
    """The exit status after a BrokenPipeError; what is still printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
    return NOBODY_READS


def parsed(
    kind: type[T],
    arguments: Sequence[str],
    prog: str,
    known: Callable[[T], Iterable[str]],
    otherwise: str = "; --help lists all options",
    **settings: Any,
) -> T:
    """An options dataclass filled from the arguments.

    Args:
      known: the options there are (without `--`), of which the nearest is named after an unknown one.
      otherwise: what is said if none is near.
      settings: further ones of tyro.cli.

    Raises:
      ConfigError: an unknown option, a word too many, or a value that a config refuses.
      SystemExit: after --help, or after one line about a value that does not fit its type.
    """
    messages, config = io.StringIO(), (tyro.conf.AvoidSubcommands,)
    try:
        with contextlib.redirect_stderr(messages):
            options, unknown = tyro.cli(
                kind,
                args=list(arguments),
                prog=prog,
                config=config,
                use_underscores=True,
                return_unknown_args=True,
                **settings,
            )
    except SystemExit as exit:
        # tyro frames a config's own error in a box; the error itself, one line, is what led to the exit.
        cause: BaseException | None = exit
        while cause := cause.__context__:
            if isinstance(cause, ConfigError):
                raise cause from None
        if exit.code:
            print(f"error: {_out_of_the_box(messages.getvalue(), prog)}", file=sys.stderr)
        raise
    if unknown:
        word = unknown[0].split("=")[0]
        if word.startswith("-"):
            hint = nearest(word, [f"--{name}" for name in known(options)])
            raise ConfigError(f"there is no option {word!r}{hint or otherwise}.")
        before = [other for other in arguments[: list(arguments).index(unknown[0])] if other.startswith("-")]
        place = f" after {before[-1].split('=')[0]}" if before else ""
        raise ConfigError(
            f"{unknown[0]!r}{place} is one word too many: quote a pattern ('*.txt') or a text with spaces{otherwise}."
        )
    return options


def _out_of_the_box(text: str, prog: str) -> str:
    """tyro's message about a value, a box of several lines, as one line."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if set(line.strip("│ ")) <= set("─-") or line[0] in "╭╰":  # a rule, or the frame
            parts.append([])
        else:
            parts[-1].append(line.strip("│ "))
    lines = [part for part in parts if part][0 if "╭" in text else 1]  # a frame of spaces has the title inside
    said = " ".join(lines).rstrip(".")
    if said.startswith("Missing from"):
        said = f"{lines[1]} is missing"
    for pattern, plain in _PLAIN.items():
        said = re.sub(pattern, plain, said)
    return f"{said}. {prog} --help shows what is allowed."


_PLAIN = {
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: ('.*')": r"\1: \2 is not a whole number",
    r"Error parsing (\S+): could not convert string to float: ('.*')": r"\1: \2 is not a number",
    r"invalid choice ('.*') for argument '(\S+)'\. Expected one of \((.*?),?\)": r"\2: \1 is not one of \3",
    r"Missing value for argument '(\S+)'\. Expected 1 values": r"\1 needs a value",
}
"""tyro's words for a value that does not fit its type -> ours."""


def field_paths(config: object, prefix: str = "") -> list[str]:
    """Dotted paths of all fields, `train.steps` among them."""
    paths = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        is_nested = dataclasses.is_dataclass(value)
        paths += field_paths(value, f"{prefix}{field.name}.") if is_nested else [prefix + field.name]
    return paths


def keep_compiled_programs(config: RunConfig) -> None:
    """A restart should not compile again. What the user has set in jax's own way stays."""
    import jax

    from engram_jax.data.cache import cache_root

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root(config.data) / "compiled"))
