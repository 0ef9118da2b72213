"""Chunks, ragged batches, rollback and forks against running whole sequences anew."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BATCH, MAX_LEN, VOCAB_SIZE, full_logits

from engram_jax.inference.cache import fork, new_cache, reset, rollback
from engram_jax.inference.decode import extend

LENGTH, SPARE = 24, 5


@partial(jax.jit, static_argnums=0)
def _step(parts, state, tokens_BT, count_B, cache):
    model = parts.model(state.params, state.buffers)
    hidden, cache = extend(model, parts.store, state.memory, state.step, tokens_BT, count_B, cache)
    return model.logits(hidden), cache


class Sequences:
    """A batch that grows: the tokens each sequence holds, the cache, and the logits after every token."""

    def __init__(self, rng, parts, state, batch=BATCH, reference=None):
        self.rng, self.reference = rng, reference or (parts, state)
        self.parts, self.state = parts, state
        self.tokens = [[] for _ in range(batch)]
        self.logits = [[] for _ in range(batch)]
        with jax.set_mesh(parts.mesh):
            self.cache = new_cache(parts.config.model, batch, MAX_LEN, SPARE)

    def add(self, chunks, width=None):
        """One step with these new tokens of each sequence, padded with other tokens to `width`."""
        width = width or max(len(chunk) for chunk in chunks)
        tokens = self.rng.integers(0, VOCAB_SIZE, (len(chunks), width)).astype(np.int32)
        for row, chunk in zip(tokens, chunks, strict=True):
            row[: len(chunk)] = chunk
        counts = np.array([len(chunk) for chunk in chunks], np.int32)
        with jax.set_mesh(self.parts.mesh):
            logits, self.cache = _step(self.parts, self.state, tokens, counts, self.cache)
        for i, chunk in enumerate(chunks):
            self.tokens[i] += list(chunk)
            self.logits[i] += list(np.asarray(logits)[i, : len(chunk)])

    def take_back(self, counts):
        with jax.set_mesh(self.parts.mesh):
            self.cache = jax.jit(rollback)(self.cache, jnp.array(counts, jnp.int32))
        for tokens, logits, count in zip(self.tokens, self.logits, counts, strict=True):
            del tokens[len(tokens) - count :], logits[len(logits) - count :]

    def check(self):
        expected = full_logits(*self.reference, self.tokens)
        for i, (tokens, logits) in enumerate(zip(self.tokens, self.logits, strict=True)):
            assert np.asarray(self.cache.length_B)[i] == len(tokens)
            if tokens:
                np.testing.assert_allclose(np.array(logits), expected[i, : len(tokens)], rtol=1e-5, atol=1e-5)


def random_tokens(rng, count):
    # Few different tokens, so that n-grams repeat; the ends of documents among them, where some windows stop.
    return rng.choice(rng.integers(0, VOCAB_SIZE, 6), count).tolist()


@pytest.mark.parametrize("size", [1, 7, LENGTH, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3))])
def test_any_chunking_gives_the_logits_of_the_whole(model, rng, size):
    sequences, tokens = Sequences(rng, *model), [random_tokens(rng, LENGTH) for _ in range(BATCH)]
    for start in range(0, LENGTH, size):
        sequences.add([row[start : start + size] for row in tokens], width=size)
    sequences.check()


def test_ragged_prompts_and_decoding_share_a_step(model, rng):
    """Prompts of other lengths in chunks of 7, while sequences that are through with theirs decode or stand still."""
    sequences = Sequences(rng, *model)
    for width, *counts in ((7, 7, 1, 0), (7, 2, 1, 7), (1, 1, 0, 1), (1, 1, 1, 1), (7, 1, 7, 3)):
        sequences.add([random_tokens(rng, n) for n in counts], width)
    sequences.check()


def test_rejected_drafts_leave_no_trace(model, rng):
    """Rollback of 0 to `spare` tokens, also to the very start, then other tokens in their places."""
    sequences = Sequences(rng, *model)
    sequences.add([random_tokens(rng, n) for n in (7, 5, 3)])
    sequences.take_back([0, 5, 2])
    sequences.add([random_tokens(rng, n) for n in (5, 7, 7)])
    sequences.check()
    sequences.take_back([3, 1, 5])
    for _ in range(4):
        sequences.add([random_tokens(rng, 1) for _ in range(BATCH)])
    sequences.check()


def test_a_place_can_be_used_again(model, rng):
    sequences = Sequences(rng, *model)
    sequences.add([random_tokens(rng, 7) for _ in range(BATCH)])
    with jax.set_mesh(sequences.parts.mesh):
        sequences.cache = reset(sequences.cache, jnp.array([True, False, True]))
    for i in (0, 2):
        sequences.tokens[i], sequences.logits[i] = [], []
    sequences.add([random_tokens(rng, n) for n in (7, 2, 1)])
    sequences.check()


def test_a_prompt_is_read_once_and_continued_many_times(model, rng):
    sequences = Sequences(rng, *model)
    sequences.add([random_tokens(rng, n) for n in (7, 4, 1)])
    with jax.set_mesh(sequences.parts.mesh):
        sequences.cache = fork(sequences.cache, jnp.array([1, 0, 1]))
    sequences.tokens = [list(sequences.tokens[i]) for i in (1, 0, 1)]
    sequences.logits = [list(sequences.logits[i]) for i in (1, 0, 1)]
    sequences.add([random_tokens(rng, 3) for _ in range(BATCH)])
    sequences.check()
