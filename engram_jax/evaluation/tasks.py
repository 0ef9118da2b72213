"""An evaluation task: a frozen dataclass of its own options that is called with a trained run.

    @dataclass(frozen=True)
    class MyTask:
        \"""One line, which --help and --list show.\"""
        lengths: tuple[int, ...] = (4096,)

        def __call__(self, model: EvaluatedRun, shared: Shared, argument: str) -> Result: ...

Its name is registered in `engram_jax.registries.TASKS` (docs/extending.md). Its fields become `--my_task.lengths` of
`engram-jax evaluate`. A task's module imports nothing heavy (jax, lm_eval) at its top, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from engram_jax.config import require
from engram_jax.evaluation.statistics import Metric
from engram_jax.registries import TASKS

if TYPE_CHECKING:
    from engram_jax.evaluation.evaluated_run import EvaluatedRun


@dataclass(frozen=True)
class Shared:
    """Options that several tasks share."""

    corpus: str = ""
    """Text to evaluate on, as data.corpus is given. Empty: the documents that the run held out of its own corpus."""
    text_key: str = "text"
    """The field that holds the text in JSONL, tfds and ArrayRecord documents of that corpus."""
    limit: int = 0
    """At most this many documents, questions or samples per task (0: all, or the task's own number)."""
    seed: int = 0
    """Seed of every random choice of a task."""

    def __post_init__(self):
        require(self.limit >= 0, f"limit={self.limit} must be 0 (all) or positive.")
        require(0 <= self.seed < 1 << 32, f"seed={self.seed} must lie in 0..2^32-1.")


@dataclass(frozen=True)
class Result:
    """What a task returns."""

    metrics: dict[str, Metric]
    """By name (`loss`, `niah_single_1@4096`): the rows of the table."""
    details: dict[str, Any] = field(default_factory=dict)
    """Anything JSON can hold: resolved settings, losses by bucket, a few samples."""


class Task(Protocol):
    def __call__(self, model: EvaluatedRun, shared: Shared, argument: str) -> Result:
        """Evaluates a run.

        Args:
          argument: the part after the colon (`--tasks lm_eval:arc_easy`); empty without one.

        Raises:
          ConfigError: the options cannot work; before any computing.
        """
        ...


def split_name(word: str) -> tuple[str, str]:
    """`lm_eval:arc_easy` -> (`lm_eval`, `arc_easy`).

    Raises:
      ConfigError: no such task; names the nearest one.
    """
    name, _, argument = word.partition(":")
    TASKS[name]  # raises
    return name, argument
