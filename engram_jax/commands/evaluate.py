"""Evaluates trained runs:  engram-jax evaluate RUN_DIR [RUN_DIR ...] [--tasks perplexity longppl ...]

Results go to RUN_DIR/evaluations/NAME.json and side by side to the screen. `--table` computes nothing and shows what
is saved there; `--paper` puts the paper's figures beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engram_jax.commands.command_line import exit_status, field_paths, keep_compiled_programs, parsed
from engram_jax.config import require
from engram_jax.errors import FINISHED, RunError
from engram_jax.evaluation.knock_out import parse_scales
from engram_jax.evaluation.tasks import Shared, all_tasks, split_name
from engram_jax.runs.settings import read_config


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluates trained runs and puts them side by side."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Runs' folders, as experiments.run wrote them."""
    tasks: tuple[str, ...] = ("perplexity",)
    """What to measure: NAME or NAME:ARGUMENT. A wrong name lists them all."""
    shared: Annotated[Shared, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Shared)
    memory_scale: tuple[str, ...] = ()
    """What the memory's rows are multiplied by: one number (0: off) or LAYER=NUMBER for some layers (1=0 2=0.5)."""
    batch_tokens: int = 4096
    """Tokens computed at a time, about."""
    placement: Literal["", "device", "host", "tiered"] = ""
    """Where the tables lie; empty: as in training."""
    mesh_fsdp: int = 1
    """Devices over which the weights are cut, and the sequences."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward widths and the vocabulary are cut."""
    name: str = ""
    """Of the results' file. Empty: made from tasks, corpus and memory scale, and a hash of what is not the default."""
    output: Path | None = None
    """The folder for the results. None: RUN_DIR/evaluations."""
    table: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compute nothing: show what is saved in the runs' evaluations."""
    paper: tyro.conf.FlagCreatePairsOff[bool] = False
    """Put the paper's Tables 1 and 2 below, with what of it was measured here."""

    def __post_init__(self):
        require(self.batch_tokens > 0, f"batch_tokens={self.batch_tokens} must be positive.")
        require(bool(self.tasks), "tasks: name one at least.")
        require(not re.search(r"[/\\]", self.name), f"name={self.name!r} is a file's name, not a path: see --output.")


def parse(arguments: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """The options, and every task with its own.

    Raises:
      ConfigError: an unknown option, by the nearest known one, or a value that an option refuses.
      SystemExit: tyro's own, for --help and values that do not fit their type.
    """
    fields = [(name, task, dataclasses.field(default_factory=task)) for name, task in all_tasks().items()]
    every_option = dataclasses.make_dataclass("EveryOption", fields, bases=(Options,), frozen=True, kw_only=True)
    every_option.__doc__ = Options.__doc__
    options = parsed(
        every_option,
        arguments,
        "engram-jax evaluate",
        lambda options: [path.removeprefix("shared.") for path in field_paths(options)],
    )
    return options, {name: getattr(options, name) for name in all_tasks()}


def evaluate(options: Options, tasks: dict[str, Any], command: Sequence[str]) -> str:
    """Runs the tasks on each run and saves the results after each task; returns the table."""
    chosen = {word: split_name(word) for word in options.tasks}
    for run_dir in options.run_dirs:
        config = read_config(run_dir)
        parse_scales(options.memory_scale, config.model.engram)
        require(
            options.output is None or len(options.run_dirs) == 1,
            f"--output={options.output}: it is one folder, and {len(options.run_dirs)} runs would overwrite each "
            "other's results there. Leave it out, or evaluate one run at a time.",
        )
    # Here, because they bring jax, which --help does not wait for.
    from engram_jax.evaluation import results
    from engram_jax.evaluation.evaluated_run import EvaluatedRun
    from engram_jax.evaluation.table import columns

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    file = f"{options.name or file_name(options, tasks)}.json"
    paths = {run_dir: (options.output or run_dir / results.FOLDER) / file for run_dir in options.run_dirs}
    for path in paths.values():
        results.check_writable(path)  # before the first of many hours
    records: list[tuple[Path, dict[str, Any]]] = []
    for run_dir, path in paths.items():
        keep_compiled_programs(read_config(run_dir))
        mesh = {"fsdp": options.mesh_fsdp, "tensor": options.mesh_tensor}
        model = EvaluatedRun.load(run_dir, options.batch_tokens, options.memory_scale, log, mesh, options.placement)
        entries: dict[str, Any] = {}
        for word, (name, argument) in chosen.items():
            log(f"{model.name}: {word}")
            started = time.perf_counter()
            result = tasks[name](model, options.shared, argument)
            entries[word] = results.entry(tasks[name], result, time.perf_counter() - started)
            record = results.record(model, options.shared, entries, ["engram-jax", "evaluate", *command])
            try:
                results.save(path, record)
            except RunError as error:  # a full disk, hours after the check
                print(
                    _rendered(columns([*records, (run_dir, results.plain(record))]), options.paper), end="", flush=True
                )
                raise RunError(f"{error} What was measured is on the screen.") from None
        log(f"{model.name}: results in {path}")
        records.append((run_dir, results.load(path)))
        del model  # one run's tables in memory at a time
    return _rendered(columns(records), options.paper)


def saved(options: Options) -> str:
    """The table of what was measured before."""
    from engram_jax.evaluation import results
    from engram_jax.evaluation.table import columns

    records = []
    for run_dir in options.run_dirs:
        read_config(run_dir)
        folder = options.output or run_dir / results.FOLDER
        found = results.load_all(folder)
        require(
            bool(found),
            f"{folder} holds no results: evaluate the run first, with engram-jax evaluate {shlex.quote(str(run_dir))}.",
        )
        records += [(run_dir, record) for record in found]
    return _rendered(columns(records), options.paper)


def _rendered(found: Sequence[Any], paper: bool) -> str:
    from engram_jax.evaluation.paper_results import paper_tables
    from engram_jax.evaluation.table import render

    return render(found, paper_tables() if paper else ())


def file_name(options: Options, tasks: Mapping[str, Any]) -> str:
    """`perplexity+longppl-books-memory-0`: a different name for each question, the same for the same.

    What it does not spell is in a hash behind it, `perplexity-7c0a12de`, so that a try-out of ten documents leaves the
    full answer alone; where that is nothing there is no hash.
    """
    parts = ["+".join(options.tasks)]
    if options.shared.corpus:
        parts.append(Path(options.shared.corpus).name)
    if options.memory_scale:
        parts.append("memory-" + ",".join(options.memory_scale))
    whole = re.sub(r"[^\w.,=+-]+", "_", "-".join(parts))
    name, unsaid = whole[:150], _unsaid(options, tasks)
    if name != whole:
        unsaid["name"] = whole
    if not unsaid:
        return name
    text = json.dumps(unsaid, sort_keys=True, default=str)  # of paths
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _unsaid(options: Options, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The question's options that are not at their defaults; only these, so that a new option renames no file."""
    chosen = sorted({split_name(word)[0] for word in options.tasks})
    found: dict[str, Any] = {}
    for prefix, ours in [("", options.shared), *[(f"{name}.", tasks[name]) for name in chosen]]:
        defaults = type(ours)()
        for field in dataclasses.fields(ours):
            value = getattr(ours, field.name)
            if value != getattr(defaults, field.name):
                found[prefix + field.name] = value
    if corpus := options.shared.corpus:
        where = os.path.abspath(corpus) if os.path.exists(corpus) else corpus  # "test" is another text elsewhere
        found["corpus"] = where
        if where == Path(corpus).name:  # python, tfds:NAME: said by the name
            del found["corpus"]
    return found


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(arguments))


def run(arguments: Sequence[str]) -> int:
    options, tasks = parse(arguments)
    require(bool(options.run_dirs), "give the folders of the runs to evaluate.")
    print(saved(options) if options.table else evaluate(options, tasks, arguments), end="")
    return FINISHED
