"""Collectives counted in compiled programs: their bytes, their groups, and the mesh axes they run along."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from engram_jax.aot import hlo
from engram_jax.aot.collectives import Network, collectives, mesh_axes, replica_groups, sent_bytes

PROGRAMS = Path(__file__).parent / "programs"
MESH = {"data": 2, "fsdp": 4}


def found_in(function, shape, spec, mesh=MESH, times_spec=None):
    devices = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=(jax.sharding.AxisType.Explicit,) * len(mesh))
    with jax.set_mesh(devices):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(devices, spec))
        mapped = jax.shard_map(function, in_specs=spec, out_specs=times_spec or spec, check_vma=False)
        text = jax.jit(mapped).lower(x).compile().as_text()
    return collectives(hlo.parse(text), Network.flat(**mesh))


CASES = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "fsdp"), ("fsdp",), 3 * 256),
    "all-reduce": (lambda x: jax.lax.psum(x, "data"), ("data",), 2 * 256 // 2),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), ("fsdp",), 256 * 3 // 4),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
        ("data",),
        256,
    ),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, ("data", "fsdp"), scatter_dimension=0, tiled=True),
        ("data", "fsdp"),
        256 * 7 // 8,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_what_each_kind_sends_along_which_axes(kind):
    """64 float32 numbers, 256 bytes, on each of 8 devices."""
    function, axes, sent = CASES[kind]
    (c,) = found_in(function, (8 * 64,), P(("data", "fsdp")), times_spec=P(("data", "fsdp")))
    assert (c.kind, c.axes, c.sent, c.times) == (kind, axes, sent, 1)


def test_collectives_in_loops_count_once_a_round():
    def loop(x):
        def one(x, _):
            return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "fsdp") * 0.1, None), x, length=3)[0], None

        return jax.lax.scan(one, x, length=5)[0]

    (c,) = found_in(loop, (8 * 64,), P(("data", "fsdp")))
    assert c.times == 15
    assert c.sent == 15 * 2 * 256 * 3 / 4


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [(0, 1), (2, 3)]),
        ("replica_groups={{0,1,2,3}}, x", [(0, 1, 2, 3)]),
        ("replica_groups={}, x", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("replica_groups=[2,4]<=[8], x", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, x",
            [(0, 1), (2, 3), (4, 5), (6, 7)],
        ),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={1}",
            [(0, 1, 2, 3), (4, 5, 6, 7)],
        ),
    ],
)
def test_every_notation_of_groups(text, groups):
    assert sorted(replica_groups(text, 8)) == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([(0, 1), (2, 3), (4, 5), (6, 7)], ("c",)),
        ([(0, 2), (1, 3), (4, 6), (5, 7)], ("b",)),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], ("a",)),
        ([(0, 1, 2, 3), (4, 5, 6, 7)], ("b", "c")),
        ([(5, 4, 1, 0), (2, 3, 6, 7)], ("a", "c")),
        ([tuple(range(8))], ("a", "b", "c")),
        ([(0, 3), (1, 2), (4, 7), (5, 6)], ()),
    ],
)
def test_axes_of_groups(groups, axes):
    assert mesh_axes(groups, {"a": 2, "one": 1, "b": 2, "c": 2}) == axes


def test_between_slices_only_a_part_travels_on_the_slower_network():
    """8 devices in 2 slices: summed within each slice, then a quarter of it on each device between them."""
    assert sent_bytes("all-reduce", 1000, 8, slices=1) == (2 * 1000 * 7 / 8, 0)
    assert sent_bytes("all-reduce", 1000, 8, slices=2) == (2 * 1000 * 3 / 4, 2 * 250 / 2)
    assert sent_bytes("all-to-all", 1000, 8, slices=2) == (1000 * 3 / 8, 500)
    assert sum(sent_bytes("all-gather", 10, 8, slices=2)) == sum(sent_bytes("all-gather", 10, 8)) == 70
    assert sent_bytes("all-gather", 10, 1) == (0, 0)


TPU = (PROGRAMS / "tpu_collectives.hlo").read_text()


def test_asynchronous_and_fused_forms_count_once():
    """What a TPU's compiler makes of collectives: fusions, start and done, and sends between slices."""
    network = Network(MESH, [0, 0, 0, 0, 1, 1, 1, 1], [(d,) for d in range(8)])
    found = {(c.kind, c.axes): c for c in collectives(hlo.parse(TPU), network)}
    sent = {key: (c.sent, c.sent_between) for key, c in found.items()}
    assert sent == {
        ("reduce-scatter", ("fsdp",)): (64 * 128 * 2 * 3 / 4, 0),
        ("all-gather", ("fsdp",)): (3 * 4 * 128 * 2, 0),
        ("reduce-scatter", ("data", "fsdp")): (128 * 3 / 4, 128 / 4 / 2),
        ("all-reduce", ("data",)): (0, 128),
        ("all-gather", ()): (128, 0),
        ("collective-permute", ("data",)): (0, 128),
    }
    assert len(collectives(hlo.parse(TPU), network)) == 7  # the send between slices is an all-reduce over data, too


GATHER = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%own (part: f32[8,128], at: s32[]) -> f32[64,128] {
  %part = f32[8,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %zeros = f32[64,128]{1,0} broadcast(%zero), dimensions={}
  ROOT %put = f32[64,128]{1,0} dynamic-update-slice(%zeros, %part, %at, %zero)
}

ENTRY %main (w: f32[8,128], k: s32[]) -> f32[64,128] {
  %w = f32[8,128]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %alone = f32[64,128]{1,0} fusion(%w, %k), kind=kLoop, calls=%own
  %gathered = f32[64,128]{1,0} all-reduce(%alone), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %summed = f32[64,128]{1,0} all-reduce(%gathered), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""


def test_an_all_reduce_that_only_gathers_is_told_from_one_that_sums():
    found = {c.is_gather for c in collectives(hlo.parse(GATHER), Network.flat(**MESH))}
    assert found == {True, False}
