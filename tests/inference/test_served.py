"""What is served is what was trained."""

from dataclasses import replace as with_changes

import jax
import numpy as np
from small_models import PAPER, VOCAB_SIZE, built, full_logits

from engram_jax.config import replace
from engram_jax.inference.served import served


def test_narrow_weights_give_the_same_bits(tokenizer, rng):
    parts, state = built(replace(PAPER, model__dtype="bfloat16"), tokenizer)
    with jax.set_mesh(parts.mesh):
        narrow = served(parts, state)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(params)) for params in (state.params, narrow.params)]
    assert sizes[1] < 0.6 * sizes[0]
    tokens = rng.integers(0, VOCAB_SIZE, (3, 20)).tolist()
    expected = full_logits(parts, state, tokens)
    np.testing.assert_array_equal(full_logits(parts, with_changes(state, params=narrow.params), tokens), expected)
