"""Where logical rows lie, against a list of rows dealt out one by one, and the first values of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.memory.table import ROW_MULTIPLE, RowInit, TableLayout

pytestmark = pytest.mark.newest

LONGEST = 80  # rows of a head here; fixed shapes keep the compilations few
CASES = [
    ((7, 11, 13), "heads below, between and above the shard counts"),
    ((1, 2, 3), "heads of fewer rows than shards"),
    ((61, 5, 79), "uneven heads"),
    ((64, 8, 72), "heads that divide"),
    (tuple(np.random.default_rng(0).integers(1, LONGEST, 3).tolist()), "random"),
    (tuple(np.random.default_rng(1).integers(1, LONGEST, 3).tolist()), "random"),
]
over_shards = pytest.mark.parametrize("shards", [1, 2, 3, 4, 8, 64])
over_heads = pytest.mark.parametrize("head_rows", [heads for heads, _ in CASES], ids=str)


def dealt(head_rows, shards):
    """One list of logical rows per shard, in local order, None for a place without a row; padding left out."""
    owned = [[] for _ in range(shards)]
    first = 0
    for rows in head_rows:
        piece = -(-rows // shards)
        for place in range(piece * shards):
            owned[place // piece].append(first + place if place < rows else None)
        first += rows
    return owned


@over_shards
@over_heads
def test_layout_agrees_with_rows_dealt_one_by_one(head_rows, shards):
    layout, owned = TableLayout(head_rows, shards), dealt(head_rows, shards)
    places = {row: (s, r) for s, rows in enumerate(owned) for r, row in enumerate(rows) if row is not None}
    assert sorted(places) == list(range(layout.num_rows)), "the oracle itself: every row has one place"
    held = len(owned[0])
    assert layout.num_rows == sum(head_rows)
    assert held <= layout.rows_per_shard < held + ROW_MULTIPLE
    assert layout.rows_per_shard == held if shards == 1 else layout.rows_per_shard % ROW_MULTIPLE == 0

    order = layout.logical_order()
    assert order.tolist() == [s * layout.rows_per_shard + r for s, r in (places[i] for i in range(layout.num_rows))]
    placed_rows = np.full(shards * layout.rows_per_shard, -1)
    placed_rows[order] = np.arange(layout.num_rows)
    np.testing.assert_array_equal(layout.to_logical(placed_rows), np.arange(layout.num_rows))

    for shard in range(shards):
        run_rows = {run.local + i: run.logical + i for run in layout.runs(shard) for i in range(run.length)}
        assert run_rows == {r: row for r, row in enumerate(owned[shard]) if row is not None}
        assert sum(run.length for run in layout.runs(shard)) == len(run_rows)


@over_shards
@over_heads
def test_locate_finds_the_place_that_was_dealt(head_rows, shards):
    layout = TableLayout(head_rows, shards)
    places = {row: (s, r) for s, rows in enumerate(dealt(head_rows, shards)) for r, row in enumerate(rows)}
    offsets = np.cumsum([0, *head_rows[:-1]])
    ids_BTH = (offsets + np.arange(LONGEST)[:, None] % np.asarray(head_rows)).reshape(2, LONGEST // 2, -1)
    owner_BTH, local_BTH = layout.locate(jnp.asarray(ids_BTH, jnp.int32))
    assert owner_BTH.dtype == local_BTH.dtype == jnp.int32 and owner_BTH.shape == local_BTH.shape == ids_BTH.shape
    expected = np.array([places[row] for row in ids_BTH.reshape(-1).tolist()]).reshape(*ids_BTH.shape, 2)
    np.testing.assert_array_equal(np.stack([owner_BTH, local_BTH], -1), expected)
    assert set(ids_BTH.reshape(-1).tolist()) == set(range(layout.num_rows)), "every row was asked for"


@over_shards
@over_heads
def test_logical_names_every_local_row(head_rows, shards):
    """Also of places before, between and after the rows: they get `num_rows`."""
    layout = TableLayout(head_rows, shards)
    local_U = jnp.arange(-3, 3 * LONGEST + 16, dtype=jnp.int32)
    logical = jax.jit(layout.logical)
    for shard, rows in enumerate(dealt(head_rows, shards)):
        expected = np.full(local_U.shape, layout.num_rows)
        expected[3 : 3 + len(rows)] = [layout.num_rows if row is None else row for row in rows]
        found_U = logical(jnp.int32(shard), local_U)
        assert found_U.dtype == jnp.int32
        np.testing.assert_array_equal(found_U, expected)
    np.testing.assert_array_equal(layout.logical(shards - 1, local_U), expected)


def test_layout_of_a_paper_sized_table_stays_in_int32():
    """16 heads near 2^27: the last rows' ids, owners and places are still exact."""
    head_rows, shards = (2**27 - 39,) * 15 + (2**27 - 41,), 256
    layout = TableLayout(head_rows, shards)
    assert 2**30 < layout.num_rows < 2**31
    in_head = np.array([0, 1, 2**26 + 5, 2**27 - 43, 2**27 - 42])
    ids_BTH = in_head[:, None] + np.cumsum([0, *head_rows[:-1]])
    owner_BTH, local_BTH = layout.locate(jnp.asarray(ids_BTH, jnp.int32))
    piece = 2**19  # of every head: ceil((2^27 - 39) / 256)
    np.testing.assert_array_equal(owner_BTH, np.broadcast_to(in_head[:, None] // piece, ids_BTH.shape))
    np.testing.assert_array_equal(local_BTH, in_head[:, None] % piece + np.arange(16) * piece)
    for b, t in np.ndindex(ids_BTH.shape):
        assert layout.logical(owner_BTH[b, t], local_BTH[b, t][None])[0] == ids_BTH[b, t]


def test_first_values_depend_on_the_key_and_the_logical_row_only(key):
    """However many rows are drawn together, in whatever order, on whatever shards: to the last bit, under jit."""
    init = jax.jit(RowInit(head_dim=8, std=0.02))
    whole_LD = np.asarray(init(key, jnp.arange(145)))
    np.testing.assert_array_equal(init(key, jnp.arange(145)[::-1]), whole_LD[::-1])
    np.testing.assert_array_equal(init(key, jnp.array([77])), whole_LD[77:78])
    np.testing.assert_array_equal(init(key, jnp.array([9, 77, 9])), whole_LD[[9, 77, 9]])
    for shards in (1, 4, 64):
        layout = TableLayout((61, 5, 79), shards)
        local_U = jnp.arange(layout.rows_per_shard)
        held_rows = jax.jit(lambda shard, layout=layout, local_U=local_U: init(key, layout.logical(shard, local_U)))
        held = [held_rows(shard) for shard in range(shards)]
        np.testing.assert_array_equal(layout.to_logical(np.concatenate(held)), whole_LD)


def test_first_values_of_other_rows_and_keys_are_independent_normal_draws(key):
    init = RowInit(head_dim=8, std=0.02)
    rows_LD = np.asarray(init(key, jnp.arange(4000)), np.float64)
    other_LD = np.asarray(init(jax.random.fold_in(key, 1), jnp.arange(4000)), np.float64)
    assert len(np.unique(rows_LD, axis=0)) == 4000
    for draws in (rows_LD, other_LD):
        # 32,000 draws: the mean's standard error is std / 179, the deviation's std / 253; five of them.
        assert abs(draws.mean()) < 5 * 0.02 / 179
        assert abs(draws.std() - 0.02) < 5 * 0.02 / 253
    assert abs(np.corrcoef(rows_LD.reshape(-1), other_LD.reshape(-1))[0, 1]) < 5 / 179
    assert abs(np.corrcoef(rows_LD[:-1].reshape(-1), rows_LD[1:].reshape(-1))[0, 1]) < 5 / 179


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_first_values_are_rounded_once(key, dtype):
    """A narrow table starts from the float32 draws, rounded: NumPy's rounding is the oracle."""
    wide_UD = np.asarray(RowInit(8, 0.5)(key, jnp.arange(50)))
    narrow_UD = RowInit(8, 0.5, dtype)(key, jnp.arange(50))
    assert narrow_UD.dtype == dtype
    np.testing.assert_array_equal(np.asarray(narrow_UD, np.float32), wide_UD.astype(dtype).astype(np.float32))
