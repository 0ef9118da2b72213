"""The names of all evaluations. A task is a frozen dataclass of its own options that is called with a model:

    @register("my_task")
    @dataclass(frozen=True)
    class MyTask:
        \"""One line, which --help shows.\"""
        lengths: tuple[int, ...] = (4096,)

        def __call__(self, model: EvaluatedRun, shared: Shared, argument: str) -> Result: ...

Its fields become `--my_task.lengths` of `engram-jax evaluate`. `argument` is what the user wrote after a
colon (`--tasks lm_eval:arc_easy`), empty without one. Modules listed in MODULES are imported to find the tasks: they
import nothing heavy (jax, lm_eval) at their top, so that --help is quick.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engram_jax.config import ConfigError, require
from engram_jax.evaluation.statistics import Metric

if TYPE_CHECKING:
    from engram_jax.evaluation.evaluated_run import EvaluatedRun

MODULES = (
    "engram_jax.evaluation.corpus_perplexity",
    "engram_jax.evaluation.long_ppl",
    "engram_jax.evaluation.ruler.task",
    "engram_jax.evaluation.lm_eval_task",
)
"""Where tasks are registered, in the order in which --help lists them."""


@dataclass(frozen=True)
class Shared:
    """What more than one task asks for."""

    corpus: str = ""
    """Text to evaluate on, as data.corpus is given. Empty: what the run held out of its own corpus."""
    text_key: str = "text"
    """The field that holds the text in JSONL, tfds and ArrayRecord documents of that corpus."""
    limit: int = 0
    """At most this many documents, questions or samples per task (0: all, or the task's own number)."""
    seed: int = 0

    def __post_init__(self):
        require(self.limit >= 0, f"limit={self.limit} must be 0 (all) or positive.")
        require(0 <= self.seed < 1 << 32, f"seed={self.seed} must lie in 0..2^32-1.")


@dataclass(frozen=True)
class Result:
    """What a task returns."""

    metrics: dict[str, Metric]
    """By name (`loss`, `niah_single_1@4096`): the rows of the table."""
    details: dict[str, Any] = field(default_factory=dict)
    """Anything JSON can hold: settings as they were resolved, losses by bucket, a few samples."""


class Task(Protocol):
    def __call__(self, model: EvaluatedRun, shared: Shared, argument: str) -> Result:
        """Evaluates `model`; raises ConfigError before any computing where the options cannot work."""
        ...


TASKS: dict[str, type[Task]] = {}
T = TypeVar("T", bound=type)


def register(name: str) -> Callable[[T], T]:
    """Decorator: makes the dataclass a task under this name."""

    def add(task: T) -> T:
        require(name not in TASKS or TASKS[name].__qualname__ == task.__qualname__, f"two tasks are called {name!r}.")
        TASKS[name] = task
        return task

    return add


def all_tasks() -> dict[str, type[Task]]:
    """Every task by name."""
    for module in MODULES:
        importlib.import_module(module)
    return TASKS


def split_name(word: str) -> tuple[str, str]:
    """`lm_eval:arc_easy` -> (`lm_eval`, `arc_easy`).

    Raises:
      ConfigError: no such task; names the nearest ones.
    """
    name, _, argument = word.partition(":")
    known = all_tasks()
    if name not in known:
        raise ConfigError(unknown_name("task", name, list(known)))
    return name, argument


def unknown_name(what: str, name: str, choices: Sequence[str]) -> str:
    """`there is no task 'rular'; the nearest is 'ruler' (all: ...)`."""
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    nearest = f"; the nearest: {', '.join(map(repr, near))}" if near else ""
    return f"there is no {what} {name!r}{nearest} (all: {', '.join(choices)})."
