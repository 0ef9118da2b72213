"""Before anything is compiled: the run's folder can be written, is one for all, and nobody else writes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from engram_jax.config import ConfigError
from engram_jax.distributed import agree, exchange, is_first

LOCK, KEY = "run.lock", "run.key"
PATIENCE = {"this host": 5, "another host": 120}
"""Seconds for the owner of a folder to go: it may be ending just now, or a file server has yet to notice its end."""


@contextlib.contextmanager
def folder_of_one_run(run_dir: Path, log: Callable[[str], None] = print) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it, until the context is left or the process ends, however it does.

    Raises:
      ConfigError: it is no folder or cannot be written, another run writes it, or the processes see different folders.
    """
    if scheme := re.match(r"(\w+):/", str(run_dir)):
        raise ConfigError(
            f"--run_dir {run_dir}: the run's folder is written as files. Mount the {scheme[1]} bucket on every host "
            "(gcsfuse, and a hierarchical namespace, in which folders are renamed at once) and give the mounted path."
        )
    with contextlib.ExitStack() as files:
        problem, key, is_new = "", "", False
        try:
            is_new = not run_dir.exists()
            run_dir.mkdir(parents=True, exist_ok=True)
            if is_first():
                key = _lock(run_dir / LOCK, files, log)
            else:
                probe = run_dir / f"process-{jax.process_index()}.probe"
                probe.touch()
                probe.unlink()
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"--run_dir {run_dir} cannot be written ({error.strerror or error}): give a folder that you may write "
                "to, on a disk with room."
            )
        if is_new:
            files.callback(_remove_if_nothing_came_of_it, run_dir)
        if problem := agree(problem):
            raise ConfigError(problem)
        _check_shared(run_dir, key)
        yield


def _remove_if_nothing_came_of_it(run_dir: Path) -> None:
    """A mistake in the settings leaves no folder behind."""
    with contextlib.suppress(OSError):  # another process may have done it
        if set(os.listdir(run_dir)) <= {LOCK, KEY}:
            for name in (LOCK, KEY):
                (run_dir / name).unlink(missing_ok=True)
        run_dir.rmdir()


def _check_shared(run_dir: Path, key: str) -> None:
    """Every process must find the key that the first one wrote; else their checkpoints would be parts of nothing."""
    key = exchange(key)[0]
    tries = 0
    while not is_first() and _read(run_dir / KEY) != key and tries < 10:  # file servers may lag
        time.sleep(1)
        tries += 1
    problem = f"--run_dir {run_dir} is not the folder that process 0 has: give one that all processes share."
    if problem := agree(problem if tries == 10 else ""):
        raise ConfigError(problem)


def _lock(path: Path, files: contextlib.ExitStack, log: Callable[[str], None]) -> str:
    """Locks the file for this process, writes who it is, and returns the key in it. Raises if another process has it.

    A POSIX lock: it ends with the process that took it, is not inherited by its children, and holds on network file
    systems too, where the owner may be on another host. Whoever has it must not open the file again: closing it would
    end the lock.
    """
    file = files.enter_context(path.open("a+"))
    waited = 0
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # which of them is the system's choice
            owner = _owner(path)
            here = owner.get("host") == socket.gethostname()
            if waited >= PATIENCE["this host" if here else "another host"]:
                raise ConfigError(
                    f"--run_dir {path.parent} is being written by another run (process {owner.get('pid', '?')} on "
                    f"{owner.get('host', 'another host')}): stop that one, or give this one its own --run_dir."
                ) from None
            if waited == 0:
                log(f"{path.parent} is still in use by process {owner.get('pid', '?')}; waiting for it to end.")
            time.sleep(1)
            waited += 1
    key = secrets.token_hex(8)
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
    file.flush()
    (path.parent / KEY).write_text(key)  # closed at once: a mounted bucket shows others no file that is still open
    return key


def _owner(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
