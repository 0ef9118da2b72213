"""Windows over long documents against the definition, by a model that says what it was shown."""

from dataclasses import dataclass

import numpy as np
import pytest

from engram_jax.config import ConfigError
from engram_jax.evaluation.evaluated_run import Scored
from engram_jax.evaluation.windows import score_documents, windows


@dataclass
class Echo:
    """Its losses are what `of` makes of the ids before each id and of the id."""

    of: object
    batch_tokens: int = 50
    name: str = "echo"
    log: object = print

    def score(self, sequences):
        return [
            Scored(
                np.array([self.of(ids[:i], ids[i]) for i in range(1, len(ids))], np.float32),
                np.array([ids[i] % 3 == 0 for i in range(1, len(ids))], bool),
            )
            for ids in sequences
        ]


def settings(rng):
    context = int(rng.integers(1, 12))
    return context, int(rng.integers(1, context + 1))


def documents(rng, count=40):
    return [np.arange(rng.integers(1, 60)) for _ in range(count)]


def test_every_id_is_scored_once_and_in_its_place(rng):
    context, stride = settings(rng)
    given = documents(rng)
    scored = list(score_documents(Echo(lambda before, x: x), given, context, stride))
    assert len(scored) == len(given)
    for ids, (same, result) in zip(given, scored, strict=True):
        assert same is ids
        np.testing.assert_array_equal(result.losses, ids[1:])
        np.testing.assert_array_equal(result.is_greedy, ids[1:] % 3 == 0)


def test_what_each_id_is_given(rng):
    """The whole document up to the context, then between context - stride and context ids, all in a row."""
    context, stride = settings(rng)
    for ids, result in score_documents(Echo(lambda before, x: len(before)), documents(rng), context, stride):
        for position, given in enumerate(result[0], start=1):
            if position <= context:
                assert given == position
            else:
                assert max(1, context - stride + 1) <= given <= context
        assert len(result.losses) == len(ids) - 1
    for ids, result in score_documents(Echo(lambda before, x: x - before[-1]), documents(rng), context, stride):
        np.testing.assert_array_equal(result.losses, np.ones(len(ids) - 1))


def test_a_stride_of_one_gives_every_id_the_whole_context():
    [(_, result)] = score_documents(Echo(lambda before, x: len(before)), [np.arange(30)], 8, 1)
    np.testing.assert_array_equal(result.losses, np.minimum(np.arange(1, 30), 8))


def test_a_window_is_no_longer_than_context_and_target(rng):
    context, stride = settings(rng)
    for length in range(70):
        found = windows(length, context, stride)
        assert all(0 < w.stop - w.start <= context + 1 for w in found)
        assert [w.scored_from for w in found[1:]] == [w.stop for w in found[:-1]]


@pytest.mark.parametrize(("context", "stride"), [(0, 1), (8, 0), (8, 9)])
def test_settings_that_cannot_work(context, stride):
    with pytest.raises(ConfigError, match=r"stride|context"):
        windows(20, context, stride)
