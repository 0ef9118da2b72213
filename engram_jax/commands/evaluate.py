"""`engram-jax evaluate RUN_DIR [RUN_DIR ...]`: evaluates trained runs and puts their numbers side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
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
from tyro.conf import arg

from engram_jax.commands.command_line import exit_status, field_paths, keep_compiled_programs, parsed
from engram_jax.config import names, require
from engram_jax.errors import FINISHED, RunError
from engram_jax.evaluation.tasks import Shared, split_name
from engram_jax.registries import TASKS
from engram_jax.runs.settings import read_config


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluates trained runs: a table on the screen, and all numbers in RUN_DIR/evaluations/NAME.json.

    For example:
      engram-jax evaluate runs/moe_tiny runs/engram_tiny --tasks perplexity longppl --limit 100
      engram-jax evaluate runs/engram_tiny --memory_scale 0
      engram-jax evaluate runs/moe_tiny runs/engram_tiny --table --paper
    """

    run_dirs: tyro.conf.Positional[Annotated[tuple[Path, ...], arg(metavar="RUN_DIR ...")]]
    """The runs' folders."""
    tasks: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("perplexity",)
    """What to measure: names of tasks, NAME or NAME:ARGUMENT. --list prints the names."""
    shared: Annotated[Shared, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Shared)
    memory_scale: Annotated[tuple[str, ...], arg(metavar="FACTOR ...")] = ()
    """Factor on the memory's rows: one number for all layers (0: memory off), or LAYER=NUMBER for some (1=0 2=0.5)."""
    batch_tokens: int = 4096
    """Tokens computed at a time, about; 1 or more."""
    placement: names.Placement | Literal[""] = ""
    """The memory that holds the tables. Empty: as in training."""
    mesh_fsdp: int = 1
    """Devices over which the weights and the sequences are cut, 1 or more."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward widths and the vocabulary are cut, 1 or more."""
    name: str = ""
    """NAME of the results' file. Empty: made from tasks, corpus and memory scale, and a hash of other options."""
    output: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder for the results. Default: RUN_DIR/evaluations."""
    table: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compute nothing: show the results that are saved in the runs' folders."""
    paper: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the paper's Tables 1 and 2 below, beside the numbers that were measured here."""

    def __post_init__(self):
        require(self.batch_tokens > 0, f"batch_tokens={self.batch_tokens} must be positive.")
        require(bool(self.tasks), "tasks: name at least one; --list prints the names.")
        require(
            not re.search(r"[/\\]", self.name), f"name={self.name!r} must be a file's name. --output takes a folder."
        )


def parse(arguments: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """The options, and every task with its own options.

    Raises:
      ConfigError: an unknown option (names the nearest), a value that an option refuses, or a task whose name cannot be
        that of an option.
      SystemExit: after --help, or after one line about a value that does not fit its type.
    """
    taken = {field.name for kind in (Options, Shared) for field in dataclasses.fields(kind)}
    for name in TASKS:
        free = name.isidentifier() and name not in taken
        require(free, f"the task {name!r} needs another name, since its options are --{name}.FIELD.")
    fields = [(name, task, dataclasses.field(default_factory=task)) for name, task in TASKS.items()]
    every_option = dataclasses.make_dataclass("EveryOption", fields, bases=(Options,), frozen=True, kw_only=True)
    every_option.__doc__ = Options.__doc__
    options = parsed(
        every_option,
        arguments,
        "engram-jax evaluate",
        lambda options: [path.removeprefix("shared.") for path in field_paths(options)],
    )
    return options, {name: getattr(options, name) for name in TASKS}


def listed() -> list[str]:
    """What `--list` prints: each task with the first line of its docstring."""
    width = max(map(len, TASKS))
    return [f"{name:{width}}  {(inspect.getdoc(task) or '').partition(chr(10))[0]}" for name, task in TASKS.items()]


def evaluate(options: Options, tasks: dict[str, Any], command: Sequence[str]) -> str:
    """Runs the tasks on each run and saves the results after each task; returns the table."""
    # Here, because they bring jax, which --help does not wait for.
    from engram_jax.evaluation import results
    from engram_jax.evaluation.evaluated_run import EvaluatedRun
    from engram_jax.evaluation.knock_out import parse_scales
    from engram_jax.evaluation.table import columns

    chosen = {word: split_name(word) for word in options.tasks}
    for run_dir in options.run_dirs:
        config = read_config(run_dir)
        parse_scales(options.memory_scale, config.model.engram)
        require(
            options.output is None or len(options.run_dirs) == 1,
            f"--output={options.output} is one folder, where {len(options.run_dirs)} runs would overwrite each other's "
            "results. Leave it out, or evaluate one run at a time.",
        )

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
                raise RunError(f"{error} The numbers are printed above.") from None
        log(f"{model.name}: results in {path}")
        records.append((run_dir, results.load(path)))
        del model  # one run's tables in memory at a time
    return _rendered(columns(records), options.paper)


def saved(options: Options) -> str:
    """The table of results that were saved before."""
    from engram_jax.evaluation import results
    from engram_jax.evaluation.table import columns

    records = []
    for run_dir in options.run_dirs:
        read_config(run_dir)
        folder = options.output or run_dir / results.FOLDER
        found = results.load_all(folder)
        require(
            bool(found),
            f"{folder} has no results. Evaluate the run first: engram-jax evaluate {shlex.quote(str(run_dir))}.",
        )
        records += [(run_dir, record) for record in found]
    return _rendered(columns(records), options.paper)


def _rendered(found: Sequence[Any], paper: bool) -> str:
    from engram_jax.evaluation.paper_results import paper_tables
    from engram_jax.evaluation.table import render

    return render(found, paper_tables() if paper else ())


def file_name(options: Options, tasks: Mapping[str, Any]) -> str:
    """`perplexity+longppl-books-memory-0`: equal names for equal questions, different names for different ones.

    Options that the name does not spell, and that are not at their defaults, add a hash: `perplexity-7c0a12de`. So a
    trial of ten documents does not overwrite the full answer.
    """
    parts = ["+".join(options.tasks)]
    if options.shared.corpus:
        parts.append(Path(options.shared.corpus).name)
    if options.memory_scale:
        parts.append("memory-" + ",".join(options.memory_scale))
    whole = re.sub(r"[^\w.,=+-]+", "_", "-".join(parts))
    name, others = whole[:150], _not_in_the_name(options, tasks)
    if name != whole:
        others["name"] = whole
    if not others:
        return name
    text = json.dumps(others, sort_keys=True, default=str)  # of paths
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _not_in_the_name(options: Options, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The question's options that are not at their defaults. Only these: then a new option renames no file."""
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
        if where == Path(corpus).name:  # python, tfds:NAME: the name spells it
            del found["corpus"]
    return found


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return exit_status(lambda: run(arguments))


def run(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--list"]:
        print("\n".join(listed()))
        return FINISHED
    options, tasks = parse(arguments)
    require(bool(options.run_dirs), "give the folders of the runs to evaluate: engram-jax evaluate RUN_DIR ...")
    print(saved(options) if options.table else evaluate(options, tasks, arguments), end="")
    return FINISHED
