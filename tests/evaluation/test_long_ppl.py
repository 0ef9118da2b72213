"""LongPPL by hand: a model that knows the needle 7 if, and only if, it sees an earlier one."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.evaluation import documents as documents_module
from engram_jax.evaluation.evaluated_run import Scored
from engram_jax.evaluation.long_ppl import LongPPL, key_tokens, short_losses
from engram_jax.evaluation.tasks import Shared

NEEDLE, KNOWN, UNKNOWN, OTHER = 7, 0.25, 5.0, 1.0


@dataclass(eq=False)
class Finder:
    known: float = KNOWN
    context: int = 40
    batch_tokens: int = 100
    name: str = "finder"
    warnings: list = field(default_factory=list)

    def score(self, sequences):
        def loss(ids, i):
            return (self.known if NEEDLE in ids[:i] else UNKNOWN) if ids[i] == NEEDLE else OTHER

        losses = [np.array([loss(ids, i) for i in range(1, len(ids))], np.float32) for ids in sequences]
        return [Scored(x, np.zeros(len(x), bool)) for x in losses]

    def warn_if_longer(self, length, what):
        if length > self.context:
            self.warnings.append(length)

    def warn_once(self, message):
        self.warnings.append(message)


def document(length: int, *needles: int) -> np.ndarray:
    ids = np.full(length, 3)
    ids[list(needles)] = NEEDLE
    return ids


@pytest.fixture
def evaluate(monkeypatch):
    def run(task, documents, model=None):
        class Given(list):
            name = "made by hand"

        monkeypatch.setattr(documents_module, "open_documents", lambda model, shared, own: Given(documents))
        return task(model or Finder(), Shared(), "")

    return run


def test_definition_by_hand():
    long = np.array([0.5, 0.5, 1.9, 2.1, 0.0, 0.5], np.float32)
    short = np.array([2.4, 2.6, 4.0, 5.0, 2.0, np.nan], np.float32)
    #                 1.9   2.1  2.1  2.9  2.0  none: LSD;  LCL above -2 but for the fourth
    np.testing.assert_array_equal(key_tokens(long, short, 2.0, -2.0), [False, True, True, False, False, False])


def test_what_a_short_window_shows():
    """Each id beyond the first K is given K to K + slide - 1 ids, and the others are not measured."""

    class Counting(Finder):
        def score(self, sequences):
            return [Scored(np.arange(1, len(ids), dtype=np.float32), np.zeros(len(ids) - 1, bool)) for ids in sequences]

    for length in range(5, 40):
        [given] = short_losses(Counting(), [np.arange(length)], 5, 3)
        assert len(given) == length - 1
        assert np.isnan(given[:4]).all()
        np.testing.assert_array_equal(given[4:], 5 + np.arange(length - 5) % 3)


def test_key_tokens_are_the_needles_that_only_long_context_finds(evaluate):
    """K = 8, slide 2. At 30 the first needle (at 2) is out of a short window's sight; at 33 the one at 30 is not."""
    result = evaluate(LongPPL(short_context=8), [document(41, 2, 30, 33), document(41), document(6, 1, 3)])
    assert result.details["num_key_tokens"] == 1
    assert result.metrics["longppl"].value == pytest.approx(math.exp(KNOWN), rel=1e-6)
    assert result.details["num_tokens"] == 2 * (41 - 8)  # the third document is shorter than a short context
    expected = (UNKNOWN * 0 + KNOWN * 2 + OTHER * (2 * 33 - 2)) / (2 * 33)
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(expected), rel=1e-6)
    assert result.metrics["key_share"].value == pytest.approx(1 / 66)


def test_a_long_document_is_cut_into_pieces_of_the_context(evaluate):
    """In its second piece nothing is known of the needle in the first."""
    result = evaluate(LongPPL(context=40, short_context=8), [document(81, 5, 30, 45, 70)])
    assert result.details["num_key_tokens"] == 2
    assert evaluate(LongPPL(context=40, short_context=8), [document(81, 5, 45)]).details["num_key_tokens"] == 0


def test_without_key_tokens_there_is_no_number(evaluate):
    result = evaluate(LongPPL(short_context=8), [document(30)])
    assert math.isnan(result.metrics["longppl"].value) and result.metrics["perplexity"].value == pytest.approx(math.e)


def test_the_evaluator_decides_and_the_model_is_measured(evaluate, monkeypatch):
    monkeypatch.setattr(LongPPL, "_evaluator", lambda self, model: Finder(known=KNOWN))
    result = evaluate(LongPPL(short_context=8), [document(41, 2, 30)], Finder(known=4.0))
    assert result.details["num_key_tokens"] == 1  # to the model itself it would be a surprise, and no key token
    assert result.metrics["longppl"].value == pytest.approx(math.exp(4.0), rel=1e-6)


def test_defaults_are_the_published_proportions(evaluate):
    details = evaluate(LongPPL(context=32_768), [document(5000)], Finder(context=32_768)).details
    assert (details["short_context"], details["slide"], details["alpha"], details["beta"]) == (4096, 1024, 2.0, -2.0)


def test_context_beyond_the_trained_is_named(evaluate):
    model = Finder()
    evaluate(LongPPL(context=100, short_context=8), [document(90)], model)
    assert 89 in model.warnings


def test_few_key_tokens_are_named(evaluate):
    few, many = Finder(), Finder(context=1000)
    evaluate(LongPPL(short_context=8), [document(41, 2, 30)], few)
    [warning] = few.warnings
    assert "only 1 of 33 tokens are key tokens" in warning
    # A needle every 20 ids, 16 of them between it and the short window's end.
    evaluate(LongPPL(short_context=4), [document(401, *range(2, 400, 20)) for _ in range(6)], many)
    assert many.warnings == []


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (LongPPL(short_context=40), "short_context=40 must be below"),
        (LongPPL(short_context=35), "no document of made by hand has more than longppl.short_context=35"),
    ],
)
def test_settings_that_cannot_work(evaluate, task, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(task, [document(20)])
