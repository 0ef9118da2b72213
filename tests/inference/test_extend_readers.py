"""Decoding with readers that lack a part: chunks, one token at a time and drafts taken back, against the whole."""

import pytest
from small_models import BATCH, PAPER, built
from test_extend import Sequences, random_tokens

from engram_jax.config import replace

READERS = {
    "one branch": replace(PAPER, model__engram__engram_without=("multi_branch", "wide_hash")),
    "over-encoding": replace(
        PAPER,
        model__engram__engram_variant="over_encoding",
        model__engram__engram_layer_ids=(0,),
        model__engram__engram_kernel_size=0,
    ),
    "no gate": replace(PAPER, model__engram__engram_without=("gate", "compression")),
}


@pytest.mark.parametrize(
    "name", ["one branch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("over-encoding", "no gate"))]
)
def test_chunks_and_single_tokens_give_the_logits_of_the_whole(name, tokenizer, rng):
    sequences = Sequences(rng, *built(READERS[name], tokenizer))
    for width, *counts in ((7, 7, 1, 0), (7, 3, 7, 5), (1, 1, 0, 1), (1, 1, 1, 1)):
        sequences.add([random_tokens(rng, n) for n in counts[:BATCH]], width)
    sequences.take_back([3, 1, 5])
    sequences.add([random_tokens(rng, 1) for _ in range(BATCH)])
    sequences.check()
