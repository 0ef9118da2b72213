"""A Python file of the user's: loaded as a module, the runs it declares, and its errors as its own."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import engram_jax
from engram_jax.config import ConfigError, RunConfig, nearest, replace, require

PACKAGE = str(Path(str(engram_jax.__file__)).parent)


def load(file: str) -> ModuleType:
    """The file as a module, run once. It may import files beside it, as a script may.

    Raises:
      ConfigError: there is no such file, or it fails; the message has the line of the file.
    """
    path = Path(file)
    require(path.suffix == ".py", f"{file} is not a Python file: its name must end in .py.")
    require(path.is_file(), f"there is no file {file}.")
    name = f"engram_jax_user_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    try:
        _as_its_own(file, lambda: loader.exec_module(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def run_of(file: str, name: str) -> tuple[RunConfig, str]:
    """The run that a function of the file returns, and the function's docstring. A run without a name gets `name`.

    Raises:
      ConfigError: there is no such file or function, the function needs arguments, fails, or returns something else.
    """
    module = load(file)
    function = getattr(module, name, None)
    if not callable(function) or inspect.isclass(function):
        raise ConfigError(f"{file} has no function {name!r}{nearest(name, run_names(module))}. {_declares(module)}")
    needed = _needed_arguments(function)
    require(
        not needed,
        f"{file}:{name} needs the arguments {', '.join(needed)}: give them defaults, or write a function without "
        "arguments that calls it.",
    )
    config = _as_its_own(file, function)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{file}:{name} returned {_article(type(config).__name__)}: it must return an engram_jax.RunConfig."
        )
    if config.name == RunConfig.__dataclass_fields__["name"].default:
        config = replace(config, name=name)
    return config, inspect.getdoc(function) or f"The run {name} of {file}."


def run_names(module: ModuleType) -> list[str]:
    """Functions of the file that return runs: annotated `-> RunConfig`, without arguments.

    If none is annotated: all its public functions without arguments.
    """
    plain = {
        name: inspect.signature(function).return_annotation
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not _needed_arguments(function)
    }
    annotated = [name for name, returns in plain.items() if _is_run(returns)]
    return annotated or [
        name for name, returns in plain.items() if returns is inspect.Signature.empty and name[0] != "_"
    ]


def runs_listed(file: str) -> list[str]:
    """A line for each run of the file: its name and the first line of its docstring.

    Raises:
      ConfigError: the file declares none.
    """
    module = load(file)
    names = run_names(module)
    require(bool(names), f"{file}: {_declares(module)}")
    width = max(map(len, names))
    return [f"{name:{width}}  {(inspect.getdoc(getattr(module, name)) or '-').splitlines()[0]}" for name in names]


def runs_declared(file: str) -> str:
    """A sentence about the runs that the file declares, for an error message."""
    return _declares(load(file))


def _declares(module: ModuleType) -> str:
    names = run_names(module)
    if not names:
        return "It declares no run: write a function without arguments that returns an engram_jax.RunConfig."
    return f"It declares {', '.join(names)}."


def _needed_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable of C
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _is_run(annotation: Any) -> bool:
    return annotation is RunConfig or (
        isinstance(annotation, str) and annotation.strip("'\"").split(".")[-1] == "RunConfig"
    )


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _as_its_own(file: str, call: Callable[[], Any]) -> Any:
    """What the user's code returns. An error is shown with the user's lines and without ours."""
    try:
        return call()
    except ConfigError as error:
        raise ConfigError(f"{_place(file, error)}{error}") from None
    except Exception as error:
        shown = traceback.TracebackException.from_exception(error)
        link: traceback.TracebackException | None = shown
        while link is not None:
            kept = _of_the_user(file, link.stack)
            link.stack = traceback.StackSummary.from_list(kept) if kept else None  # type: ignore[assignment]
            link = link.__cause__ or link.__context__
        print("".join(shown.format()), end="", file=sys.stderr)
        said = str(error).partition("\n")[0]
        raise ConfigError(f"{_place(file, error)}{type(error).__name__}{': ' * bool(said)}{said}") from None


def _of_the_user(file: str, frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """The frames of the user's file and of what it calls, down to where a call enters this package."""
    path = str(Path(file).resolve())
    last = max((i for i, frame in enumerate(frames) if frame.filename == path), default=-1)
    kept = [frame for frame in frames[: last + 1] if not _is_ours(frame)]
    for frame in frames[last + 1 :]:
        if _is_ours(frame):
            if last >= 0:
                break
            continue
        kept.append(frame)
    return kept


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith((PACKAGE, "<frozen importlib"))


def _place(file: str, error: BaseException) -> str:
    """`my_runs.py:12: `, the last line of the user's file that led to the error."""
    path = str(Path(file).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"{file}:{lines[-1]}: " if lines else f"{file}: "
