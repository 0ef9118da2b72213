"""The task `lm_eval:NAME`: any task of EleutherAI's lm-evaluation-harness, with its own metrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_jax.config import ConfigError, nearest, require
from engram_jax.errors import RunError, missing_extra
from engram_jax.evaluation.statistics import Metric
from engram_jax.evaluation.tasks import Result, Shared

if TYPE_CHECKING:
    from engram_jax.evaluation.evaluated_run import EvaluatedRun

MISSING = missing_extra("lm_eval", "eval")


@dataclass(frozen=True)
class LmEval:
    """A task, group or tag of lm-evaluation-harness, as --tasks lm_eval:NAME. Most load data from the web."""

    include: str = ""
    """Folder of more tasks (YAML files), as the harness's --include_path."""
    fewshot: int = -1
    """Examples before each question. -1: the task's own number."""
    max_length: int = 0
    """Most ids of context. 0: the length the run was trained at (data.seq_len)."""

    def __post_init__(self):
        require(self.fewshot >= -1, f"lm_eval.fewshot={self.fewshot} must be -1 (the task's own) or more.")
        require(self.max_length >= 0, f"lm_eval.max_length={self.max_length} must be 0 (as trained) or positive.")

    def __call__(self, model: EvaluatedRun, shared: Shared, argument: str = "") -> Result:
        require(bool(argument), "lm_eval needs a task of the harness, for example --tasks lm_eval:hellaswag.")
        require(not self.include or Path(self.include).is_dir(), f"lm_eval.include={self.include!r} is not a folder.")
        require(importlib.util.find_spec("lm_eval") is not None, MISSING)
        from lm_eval.evaluator import simple_evaluate

        from engram_jax.evaluation.lm_eval_model import EngramLM

        tasks = load_tasks(argument, self.include)
        results = simple_evaluate(
            model=EngramLM(model, self.max_length, shared.seed),
            tasks=tasks,
            num_fewshot=None if self.fewshot < 0 else self.fewshot,
            limit=shared.limit or None,
            log_samples=False,
            random_seed=shared.seed,
            numpy_random_seed=shared.seed,
            fewshot_random_seed=shared.seed,
        )
        assert results is not None  # None only on other processes than the first
        return result_of(argument, results)


def load_tasks(name: str, include: str) -> list[Any]:
    """The harness's task or group of that name, or the tasks of that tag, with their data.

    Raises:
      ConfigError: there is no such task; names the nearest.
      RunError: its code or its data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include or None)
    if name not in manager.all_tasks:
        raise ConfigError(
            f"lm_eval: the harness has no task {name!r}{nearest(name, manager.all_tasks)}. "
            "python -m engram_jax.evaluation.lm_eval ls tasks lists all; --lm_eval.include adds a folder of tasks."
        )
    try:
        loaded = manager.load(name)
    except Exception as error:  # tasks bring code of their own, and data from anywhere
        message = str(error).strip().partition("\n")[0]
        raise RunError(f"lm_eval: task {name!r} cannot be loaded: {type(error).__name__}: {message}") from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def result_of(asked: str, results: Mapping[str, Any]) -> Result:
    """The harness's results: metrics of the task asked for under their own names, and of tasks in it as TASK.METRIC.

    The harness names a metric `acc,none` (the filter last) and its standard error `acc_stderr,none`.
    """
    metrics = {}
    for task in (asked, *(name for name in results["results"] if name != asked)):
        values = results["results"].get(task, {})
        count = results["n-samples"].get(task, {}).get("effective", 0)
        for key, value in values.items():
            name, _, kept = key.partition(",")
            if not isinstance(value, int | float) or not kept or name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr,{kept}")
            label = name if kept == "none" else f"{name}[{kept}]"
            metrics[label if task == asked else f"{task}.{label}"] = Metric(
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                count=count,
                clusters=count,
                higher_is_better=bool(results.get("higher_is_better", {}).get(task, {}).get(name, True)),
            )
    settings = {name: results[name] for name in ("versions", "n-shot", "n-samples") if name in results}
    return Result(metrics, settings | {"lm_eval_version": results.get("lm_eval_version")})
