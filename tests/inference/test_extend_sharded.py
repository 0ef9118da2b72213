"""Decoding over several devices gives what running whole sequences on one gives."""

import pytest
from small_models import PAPER, built
from test_extend import Sequences, random_tokens

from engram_jax.config import replace

MESHES = {
    "fsdp, expert": {"train__mesh_fsdp": 2, "train__mesh_expert": 2},
    "fsdp, tensor": {"train__mesh_fsdp": 2, "train__mesh_tensor": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_changes_nothing(tokenizer, rng, mesh):
    config = PAPER
    sequences = Sequences(
        rng,
        *built(replace(config, **MESHES[mesh]), tokenizer, devices=4),
        batch=4,
        reference=built(config, tokenizer),
    )
    for width, *counts in ((7, 7, 1, 0, 3), (7, 2, 1, 7, 1), (1, 1, 0, 1, 1)):
        sequences.add([random_tokens(rng, n) for n in counts], width)
    sequences.check()
