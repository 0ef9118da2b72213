"""Checkpoints: written asynchronously and atomically by Orbax, restored to the newest one that is whole.

One step holds `state` (the TrainState without tables), `tables` (runs/table_checkpoint.py) and `meta` (the resolved
config, the hash constants, fingerprints of tokenizer and corpus): all that must agree before the state means anything.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from engram_jax.config import CheckpointConfig
from engram_jax.distributed import agree, is_first
from engram_jax.errors import RunError
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState
from engram_jax.runs.table_checkpoint import RestoreTables, SaveTables, WriteTables

UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last write, also on an error.

    Among several processes each writes its shards, and all must make the same calls.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        parts: Parts,
        log: Callable[[str], None] = print,
        read_only: bool = False,
    ):
        """`read_only` changes nothing in the folder, in which a run may be writing just now."""
        self.directory, self.log, self.read_only = directory.absolute(), log, read_only
        self._store, self._mesh = parts.store, parts.mesh
        self.directory.mkdir(parents=True, exist_ok=True)
        if read_only:
            options = ocp.CheckpointManagerOptions(create=False)  # Orbax's own read_only warns on every opening
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, cleanup_tmp_directories=True)
            for leftover in sorted(self.directory.glob(f"*{UNFINISHED}*")):
                log(f"Checkpoint {leftover.name.split('.')[0]} was only half written when the run ended: skipped.")
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "tables", "meta"))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # Closing waits for the other processes, which may know nothing of the error and never come.
        if kind is None or jax.process_count() == 1:
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        meta: dict[str, Any],
        write_tables: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes the tables and starts writing the rest; returns as soon as that is copied.

        `write_tables` writes them into the folder it is given, where the state holds none.

        Raises:
          RunError: the disk has less room than the state takes, or the previous write failed.
        """
        if step in self._manager.all_steps():
            return
        without_tables = replace(state, memory=replace(state.memory, tables={}))
        self.check_room(without_tables)
        items = {"state": ocp.args.StandardSave(without_tables), "meta": ocp.args.JsonSave(meta)}
        if self._store.layers:
            items["tables"] = (
                WriteTables(write_tables) if write_tables else SaveTables(self._store, self._mesh, state.memory.tables)
            )
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except OSError as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until everything is written; raises as `save` does."""
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._failed(error) from error

    def check_room(self, state: Any) -> None:
        """Raises `RunError` if the disk cannot hold one more copy of the tables and of `state` (arrays or shapes)."""
        needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) + self._store.num_bytes
        free = shutil.disk_usage(self.directory).free
        problem = (
            f"{self.directory} has {free / 1e9:.2f} GB free and a checkpoint takes up to {needed / 1e9:.2f} GB. "
            f"{self._last_good()} Free some space, then give the same command again."
        )
        if problem := agree(problem if free < needed else ""):
            raise RunError(problem)

    def restore(
        self, abstract: TrainState, check: Callable[[dict[str, Any]], None], tables: bool = True
    ) -> TrainState | None:
        """The newest state that can be read, or None. `check` sees the meta first and raises if it does not fit.

        Without `tables` they stay in their files (run_folder.tables_of), for whoever reads them row by row.

        A checkpoint that cannot be read is named and the one before it is taken.

        Raises:
          RunError: there are checkpoints, but none can be read.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps):
            meta = self._read(step, problems, meta=ocp.args.JsonRestore())
            if meta is None:
                continue
            check(meta["meta"])
            items: dict[str, ocp.args.CheckpointArgs] = {"state": ocp.args.StandardRestore(abstract)}
            if self._store.layers and tables:
                items["tables"] = RestoreTables(self._store, self._mesh)
            read = self._read(step, problems, **items)
            if read is not None:
                self._set_aside(problems)
                state = read["state"]
                return replace(state, memory=replace(state.memory, tables=read.get("tables") or {}))
        if problems:
            raise RunError(
                f"No checkpoint in {self.directory} can be read "
                f"({'; '.join(f'{step}: {reason}' for step, reason in problems.items())}). "
                "Restore the folder from a copy, or delete it to start again."
            )
        return None

    def _read(self, step: int, problems: dict[int, str], **items: ocp.args.CheckpointArgs) -> Any | None:
        """None, and an entry in `problems`, if any process cannot read it."""
        reason, read = "", None
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # a damaged array is no more than this to Orbax
            reason = str(error.__cause__ or error).strip() or type(error).__name__
        if reason := agree(reason.split("\n", 1)[0][:200]):
            problems[step] = reason
            self.log(f"Checkpoint {step} cannot be read ({reason}): skipped.")
            return None
        return read

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Renames checkpoints that cannot be read: Orbax saves no step that is not beyond the newest one it sees."""
        steps = list(steps)
        if self.read_only or not steps:
            return
        for step in steps if is_first() else ():
            aside = self.directory / f"{step}.unreadable"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
        agree("")  # the others look again once it is done
        self._manager.reload()

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"A checkpoint could not be written to {self.directory}: {error}. {self._last_good()}")

    def _last_good(self) -> str:
        steps = self.steps
        return f"The last complete checkpoint is step {steps[-1]}." if steps else "There is no complete checkpoint yet."
