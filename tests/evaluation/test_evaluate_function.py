"""`engram_jax.evaluate`: what `engram-jax evaluate` computes, from Python."""

import pytest

import engram_jax
from engram_jax import ConfigError, RunError
from engram_jax.evaluation.corpus_perplexity import Perplexity
from engram_jax.evaluation.tasks import Shared


def test_it_is_the_task_on_the_model(model, run_dir):
    """By name, as an object with options of its own, and from the run's folder: the same numbers."""
    task = Perplexity(context=64, ngram_order=0)
    expected = task(model, Shared(limit=3))
    assert engram_jax.evaluate(model, task, limit=3) == expected
    loss, other = expected.metrics["loss"], engram_jax.evaluate(str(run_dir), task, limit=3).metrics["loss"]
    assert (other.count, other.clusters) == (loss.count, loss.clusters)
    assert other.value == pytest.approx(loss.value, rel=1e-6)  # larger batches round otherwise
    by_name = engram_jax.evaluate(model, limit=3)
    assert by_name == Perplexity()(model, Shared(limit=3)) and by_name.metrics["loss"].unit == "nats per token"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "perplexty"}, "there is no task 'perplexty'; the nearest is 'perplexity'"),
        ({"task": "perplexity:x"}, "takes no argument"),
        ({"limit": -1}, "limit=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_arguments_are_refused(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        engram_jax.evaluate(model, **arguments)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it has no config\.json"):
        engram_jax.evaluate(tmp_path)
