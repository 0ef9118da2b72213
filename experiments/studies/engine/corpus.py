"""Checks of the corpus before anything is trained: is it long enough, and is it the text that finished runs saw?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from engram_jax.config import ConfigError, replace
from experiments.studies.engine.declared import Point
from experiments.studies.engine.execute import is_finished, run_dir
from experiments.studies.engine.finished_runs import FinishedRuns
from experiments.studies.engine.results import results


def check_corpus(
    points: Sequence[Point], seeds: int, study_dir: Path, known: FinishedRuns, log: Callable[[str], None]
) -> None:
    """Opens the text that all points read, and logs how often they read it. Does nothing if all runs are finished.

    The first time, the text is tokenised.

    Raises:
      ConfigError: the corpus is unfit, or it is not the text of a run that is finished or known.
      RunError: finished runs saw different texts.
    """
    from engram_jax.data.loader import load_data
    from engram_jax.data.repeats import repeats_line
    from engram_jax.training.init_from import data_tokenizer

    runs = [(point.name, seed, run_dir(study_dir, point, seed)) for point in points for seed in range(seeds)]
    there = [name for name, seed, folder in runs if is_finished(folder) or (name, seed) in known]
    if len(there) == len(runs):
        return
    longest = max((point.config for point in points), key=lambda config: config.train.steps)
    data = replace(longest.data, tokenizer=data_tokenizer(longest, study_dir))
    text = load_data(data, longest.model.vocab_size, log)
    if line := repeats_line(text.train, data, longest.train.steps):
        log(line)
    if there:
        row = results(points, seeds, study_dir, known)[0]
        if row["corpus_sha256"] != text.corpus_sha256:
            raise ConfigError(
                f"data.corpus={data.corpus!r} is not the text that finished runs saw, such as "
                f"{row['point']}-seed{row['seed']}: restore the text, or start again in another --out."
            )
