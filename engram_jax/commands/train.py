"""`engram-jax train FILE.py:FUNCTION`: trains runs that the user declares in a Python file of their own.

  engram-jax train my_runs.py:small                     trains it; the same command again resumes
  engram-jax train my_runs.py:small my_runs.py:large    one after the other, then compares them (the first: baseline)
  engram-jax train my_runs.py --list                    the functions in the file that return a run
  ... --print                                           the settings, parameters, FLOPs and bytes, then stop
  ... --help                                            every field that can be overridden, with its default
  ... --run_dir DIR                                     where checkpoints and metrics go (default runs/FUNCTION)
  ... --train.steps 50                                  overrides a field; tuples: 1 4, booleans: True or False
  ... --slice v5p-64                                    mesh axes and batch parts for that TPU slice

FUNCTION takes no arguments and returns an `engram_jax.RunConfig`; its docstring is what --help shows. Variants that the
file registers (`engram_jax.registries`) can be named in its settings.

Several hosts: run this on each. TPU slices, GKE and Slurm are detected; otherwise pass --coordinator HOST:PORT
--num_processes N --process_id I. DIR must be a folder that all of them share.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from engram_jax.commands.command_line import training_status
from engram_jax.commands.run_options import parse, take_slice, train_all
from engram_jax.config import ConfigError, RunConfig, nearest, replace, require
from engram_jax.errors import FINISHED


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status (errors.py). Errors are one line each."""
    return training_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    first_option = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    targets, overrides = arguments[:first_option], arguments[first_option:]
    if not targets and (not overrides or overrides[0] in ("-h", "--help")):
        print((__doc__ or "").strip())
        return FINISHED
    require(bool(targets), f"the file comes first: engram-jax train FILE.py:FUNCTION {' '.join(overrides)}")
    if overrides == ["--list"]:
        for target in targets:
            print("\n".join(_listed(target.rpartition(":")[0] if _names_function(target) else target)))
        return FINISHED
    overrides, where = take_slice(overrides)
    runs = {}
    for target in targets:
        name, config, about = declared(target)
        require(name not in runs, f"{target}: two of the runs are called {name!r}, and each needs its own folder.")
        runs[name] = parse(where(config), overrides, f"engram-jax train {target}", about)
    return train_all(runs)


def declared(target: str) -> tuple[str, RunConfig, str]:
    """Name, settings and docstring of the run that `FILE.py:FUNCTION` declares.

    Raises:
      ConfigError: no such file or function (lists those that there are), or the function returns no run. An error
        inside the user's file is shown as Python shows it, from the user's own line on.
    """
    require(_names_function(target), f"{target}: write FILE.py:FUNCTION. {_choices(target)}")
    file, _, name = target.rpartition(":")
    module = load_file(file)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{file} has no function {name!r}{nearest(name, run_functions(module))}. {_choices(file)}")
    config = _of_the_user(file, function)
    require(
        isinstance(config, RunConfig),
        f"{target} returned {type(config).__name__}: it must return an engram_jax.RunConfig.",
    )
    if config.name == RunConfig.__dataclass_fields__["name"].default:
        config = replace(config, name=name)
    return name, config, inspect.getdoc(function) or f"The run {name} of {file}."


def load_file(file: str) -> ModuleType:
    """The user's Python file as a module, imported once. Files beside it can be imported by it, as in a script.

    Raises:
      ConfigError: there is no such file, or it is not Python; what the file itself raises is told with its line.
    """
    path = Path(file)
    require(path.suffix == ".py", f"{file}: not a Python file. Write FILE.py:FUNCTION.")
    require(path.is_file(), f"{file}: no such file.")
    name = f"engram_jax_user_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    loader = spec.loader
    try:
        _of_the_user(file, lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def run_functions(module: ModuleType) -> list[str]:
    """Names of the module's own functions that say that they return a RunConfig and need no arguments."""

    def is_run(function: Any) -> bool:
        if not inspect.isfunction(function) or function.__module__ != module.__name__:
            return False
        signature = inspect.signature(function)
        returns = signature.return_annotation
        needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
        return not needed and (returns is RunConfig or str(returns).rpartition(".")[2] == "RunConfig")

    return [name for name, function in vars(module).items() if is_run(function)]


def _names_function(target: str) -> bool:
    file, colon, name = target.rpartition(":")
    return bool(colon) and name.isidentifier() and bool(file)


def _choices(target: str) -> str:
    file = target.partition(".py")[0] + ".py"
    if not Path(file).is_file():
        return f"There is no file {file}."
    names = run_functions(load_file(file))
    return f"It declares {', '.join(names)}." if names else "It has no function annotated `-> RunConfig`."


def _listed(file: str) -> list[str]:
    module = load_file(file)
    names = run_functions(module)
    require(bool(names), f"{file}: it has no function annotated `-> RunConfig`.")
    width = max(map(len, names))
    return [f"{name:{width}}  {(inspect.getdoc(getattr(module, name)) or '-').splitlines()[0]}" for name in names]


def _of_the_user(file: str, call: Callable[[], Any]) -> Any:
    """What the user's code returns. Its errors end the command with the user's own frames, and with none of ours."""
    try:
        return call()
    except ConfigError as error:
        raise ConfigError(f"{_where(file, error)}{error}") from None
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        frames = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")]
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)] if frames else []
        print("".join([*lines, *traceback.format_exception_only(error)]), end="", file=sys.stderr)
        raise ConfigError(f"{_where(file, error)}the file failed with {type(error).__name__} (above).") from None


def _where(file: str, error: BaseException) -> str:
    """`my_run.py:12: `, the last line of the user's file that led to the error."""
    path = str(Path(file).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    number = line or (lines[-1] if lines else None)
    return f"{file}:{number}: " if number else f"{file}: "
