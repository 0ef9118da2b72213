"""Layouts of long sequences: over how many devices one is cut, and what else that changes."""

import pytest

from engram_jax.aot.chips import topology
from engram_jax.aot.remedies import remedies
from engram_jax.aot.slices import MIN_PIECE, laid_out
from engram_jax.config import replace
from experiments.runs.registry import build

LONG = replace(build("engram_27b"), data__seq_len=32_768, data__batch_size=192)


@pytest.mark.parametrize(
    ("name", "context", "grad_accum"),
    [
        ("v5p-64", 1, 3),  # a sequence's 20 GB of streams have room on 103 GB
        ("v5p-128", 2, 3),  # 192 sequences do not divide over 128 devices
        ("v6e-256", 4, 3),  # a third of a sequence has room on 34 GB
        ("v5e-256", 8, 6),
    ],
)
def test_a_sequence_lies_on_as_few_devices_as_have_room(name, context, grad_accum):
    train = laid_out(LONG, topology(name)).train
    assert (train.mesh_context, train.grad_accum) == (context, grad_accum)


@pytest.mark.parametrize("name", ["v5e-4", "v5e-64", "v5e-256", "v5p-64", "v5p-128", "v6e-256", "7x-64"])
@pytest.mark.parametrize("length", [4096, 16_384, 32_768])
@pytest.mark.parametrize("model", ["engram_27b", "moe_27b"])
def test_long_sequences_and_all_else_divide(model, length, name):
    """What assembly.py asks of a mesh."""
    where = topology(name)
    config = laid_out(replace(build(model), data__seq_len=length, data__batch_size=192), where)
    train = config.train
    shards = where.devices // train.mesh_context
    assert where.devices % (train.mesh_fsdp * train.mesh_expert * train.mesh_context) == 0
    assert config.data.batch_size % (train.grad_accum * shards) == 0
    assert config.model.hidden_size % (train.mesh_fsdp * train.mesh_expert * train.mesh_context) == 0
    assert length % train.mesh_context == 0 and length // train.mesh_context >= MIN_PIECE


def test_short_sequences_stay_whole():
    assert laid_out(build("moe_tiny"), topology("v5e-4")).train.mesh_context == 1
    assert laid_out(replace(build("engram_27b"), data__seq_len=1024), topology("v5e-256")).train.mesh_context == 1


@pytest.mark.parametrize(
    ("run", "name", "experts"),
    [
        ("moe_27b", "v5e-256", 8),  # weights are 4.5 times their tokens: exchanged on a 2D torus
        ("moe_2e18", "v5e-64", 4),  # 2.05 times
        ("moe_2e20", "v5p-64", 1),  # 1.05 times: gathered on a 3D torus,
        ("engram_2e20", "v5p-64", 1),  # as its twin's
        ("moe_2e18", "v5p-128", 4),  # 4.1 times
    ],
)
def test_experts_are_distributed_where_gathering_them_costs_more(run, name, experts):
    assert laid_out(build(run), topology(name)).train.mesh_expert == experts


def test_a_sequence_alone_may_be_cut_further():
    """One sequence to a device, all of the batch in the smallest parts: what is left is to cut the sequence."""
    config = replace(LONG, train__mesh_fsdp=64, train__mesh_data=1, train__grad_accum=3)
    (cut,) = [r for r in remedies(config, topology("v5p-64")) if set(r.changes) >= {"train__mesh_context"}][:1]
    assert cut.changes == {
        "train__mesh_context": 2,
        "train__mesh_fsdp": 32,
        "train__mesh_data": -1,
        "train__grad_accum": 6,
    }
    with_room = replace(config, train__grad_accum=1)
    assert not any("train__mesh_context" in r.changes for r in remedies(with_room, topology("v5p-64")))
