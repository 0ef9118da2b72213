"""The function behind `engram_jax.evaluate`: one evaluation of one trained run, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engram_jax.evaluation.tasks import Result, Shared, Task, split_name
from engram_jax.registries import TASKS

if TYPE_CHECKING:
    from engram_jax.evaluation.evaluated_run import EvaluatedRun


def evaluate(
    run: Path | str | EvaluatedRun,
    task: str | Task = "perplexity",
    *,
    corpus: str = "",
    limit: int = 0,
    seed: int = 0,
) -> Result:
    """Evaluates a trained run; by default its perplexity on the documents that training held out.

        result = evaluate("runs/engram_tiny", limit=100)
        result.metrics["loss"].value          nats per token
        result.metrics["perplexity"].stderr   standard error over documents

    Saves nothing; `engram-jax evaluate` also writes the numbers to the run's folder and compares runs.

    Args:
      run: the run's folder, or an `EvaluatedRun`, which saves loading it once more.
      task: NAME or NAME:ARGUMENT, as `engram-jax evaluate --help` lists them, or a task with options of its own:
        `Perplexity(context=2048)`.
      corpus: the text to evaluate on, as `DataConfig.corpus` is written. Empty: what the run held out of its own.
      limit: documents, questions or samples at most. 0: all.
      seed: of what a task draws, 0..2^32-1.

    Returns:
      `metrics`, numbers by name with unit and standard error, and `details`, which JSON can hold.

    Raises:
      ConfigError: an unknown task, an option out of its range, or a corpus that cannot be read.
      RunError: the folder is not a run, or has no checkpoint.
    """
    from engram_jax.evaluation.evaluated_run import EvaluatedRun

    shared, argument = Shared(corpus=corpus, limit=limit, seed=seed), ""
    if isinstance(task, str):
        name, argument = split_name(task)
        chosen: Task = TASKS[name]()  # a dataclass whose options all have defaults
    else:
        chosen = task
    loaded = run if isinstance(run, EvaluatedRun) else EvaluatedRun.load(Path(run))
    return chosen(loaded, shared, argument)
