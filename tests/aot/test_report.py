"""Warnings about collectives: what must never travel whole, and what rightly does."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from engram_jax.aot.chips import topology
from engram_jax.aot.collectives import Collective
from engram_jax.aot.report import warnings

SHARDS, PART = 4, 10 * 2**20
MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)
PARTS = SimpleNamespace(
    store=SimpleNamespace(num_bytes=SHARDS * PART, shards=SHARDS),
    abstract_state=lambda: SimpleNamespace(
        params={"blocks": {"w": MATRIX.update(shape=(3, 256, 256))}, "head": MATRIX}
    ),
)


def collective(kind, result_bytes, is_gather=False):
    return Collective(kind, ("fsdp",), 4, 1, "f32[8,8]", result_bytes, 1.0, 1.0, 0.0, "jit(step)/x", is_gather)


def said(*sent, exchanged=0):
    return warnings(list(sent), PARTS, topology("v5p-64"), exchanged)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["all-to-all", "ragged-all-to-all"])
def test_an_exchange_may_be_as_large_as_the_batchs_rows(kind):
    """Many tokens that read a small table ask for more than half of what a device holds of it."""
    rows = PART // 2 + 1024
    assert said(collective(kind, rows), exchanged=rows) == []
    (warning,) = said(collective(kind, rows + 1), exchanged=rows)
    assert warning.startswith(f"table-sized: {kind}")
    assert said(collective(kind, PART // 2 - 1)) == []


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "collective-permute"])
def test_nothing_but_an_exchange_moves_rows(kind):
    (warning,) = said(collective(kind, PART // 2), exchanged=PART)
    assert warning.startswith(f"table-sized: {kind}")


def test_more_than_a_layers_weights_gathered_at_once():
    a_layer = 256 * 256
    assert said(collective("all-gather", 4 * a_layer)) == []
    (warning,) = said(collective("all-gather", 4 * a_layer + 1))
    assert warning.startswith("more than a layer at once")


def test_a_gather_by_all_reduce_says_how_to_avoid_it():
    (warning,) = said(collective("all-reduce", 2**20 + 1, is_gather=True))
    assert "train.mesh_data=2" in warning
