"""Tables on disk: bit-exact on any shards, within a few chunks of memory."""

import shutil
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_tables import FIELDS, HEADS, assert_same, junk, place, random_rows, read, rows_of, write, zeros

from engram_jax.memory.table import TableLayout
from engram_jax.memory.table_files import CHUNK_BYTES, SCRATCH_BYTES, ShardWriter, TableReader, rows_per_chunk
from engram_jax.memory.table_index import Field, TableFileError

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("hops", [(8, 1, 4, 8), (64, 3), (3, 64)])
def test_round_trips_over_other_shards_keep_every_bit(tmp_path, hops):
    logical = random_rows(sum(HEADS), seed=sum(hops))
    placed = place(logical, HEADS, hops[0], junk)
    for hop, (shards, after) in enumerate(zip(hops, (*hops[1:], 1), strict=True)):
        write(tmp_path / str(hop), TableLayout(HEADS, shards), placed, chunk=17)
        reader = TableReader(tmp_path / str(hop))
        reader.check(TableLayout(HEADS, after), FIELDS)
        placed = read(reader, TableLayout(HEADS, after), chunk=29)
        assert_same(placed, place(logical, HEADS, after, zeros))
    assert_same({name: array[0] for name, array in placed.items()}, logical)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.lists(st.integers(1, 23), min_size=1, max_size=4).map(tuple),
    saved_on=st.integers(1, 9),
    read_on=st.integers(1, 9),
    written=st.integers(1, 30),
    asked=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_heads_shards_and_chunks(tmp_path_factory, heads, saved_on, read_on, written, asked, seed):
    directory, logical = tmp_path_factory.mktemp("any"), random_rows(sum(heads), seed)
    write(directory, TableLayout(heads, saved_on), place(logical, heads, saved_on, junk), written)
    placed = read(TableReader(directory), TableLayout(heads, read_on), asked)
    assert_same(placed, place(logical, heads, read_on, zeros))
    shutil.rmtree(directory)


def test_writers_of_shards_in_any_order_and_parts_read_alone(saved, tmp_path):
    directory, layout, logical = saved
    write(tmp_path / "again", layout, place(logical, HEADS, 4, zeros), chunk=7, shards=(2, 0, 3, 1))
    some = TableReader(tmp_path / "again").read(TableLayout(HEADS), 0, 99, 12, names=["uses"])
    assert_same(some, {"uses": logical["uses"][99:111]})
    everything = TableReader(directory).read(TableLayout(HEADS), 0, 380, 7)
    assert_same(everything, {name: array[380:387] for name, array in logical.items()})


def test_chunks_of_the_named_size():
    fields = {"rows": Field.of((100,), np.float32), "uses": Field.of((), np.int32)}
    assert rows_per_chunk(fields) == CHUNK_BYTES // 404
    assert rows_per_chunk({"rows": Field.of((2**30,), np.float32)}) == 1


@pytest.mark.parametrize("where", [(4, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 105), (0, 104, 1)])
def test_rows_outside_the_layout_are_an_error(saved, where):
    directory, layout, _ = saved
    assert layout.rows_per_shard == 104
    with pytest.raises(ValueError, match="There are no rows"):
        TableReader(directory).read(layout, *where)


@pytest.mark.parametrize(
    ("start", "arrays", "message"),
    [
        (0, rows_of(0, 10), "are not the next rows: .* start at 10 and end by 104"),
        (20, rows_of(0, 10), "are not the next rows"),
        (10, rows_of(0, 95), "are not the next rows"),
        (10, rows_of(0, 0), "are not the next rows"),
        (10, {"rows": rows_of(0, 10)["rows"]}, "equally many rows"),
        (10, rows_of(0, 10) | {"uses": np.zeros(9, np.int32)}, "equally many rows"),
        (10, rows_of(0, 10) | {"uses": np.zeros(10, np.int64)}, "equally many rows"),
        (10, rows_of(0, 10) | {"uses": np.zeros(10, ">i4")}, "equally many rows"),
        (10, rows_of(0, 10) | {"rows": rows_of(0, 10)["rows"][:, :3]}, "equally many rows"),
    ],
)
def test_only_the_next_chunk_can_be_written(tmp_path, start, arrays, message):
    writer = ShardWriter(tmp_path, TableLayout(HEADS, 4), 0, FIELDS)
    writer.write(0, rows_of(0, 10))
    with pytest.raises(ValueError, match=message):
        writer.write(start, arrays)
    writer.write(10, rows_of(10, 94))
    writer.close()
    with pytest.raises(ValueError, match="closed or was aborted"):
        writer.close()


def test_strided_rows_are_written_as_they_read(tmp_path):
    """What a device gives back is not always C-contiguous."""
    wide = np.arange(12 * 8, dtype=np.float32).reshape(8, 12).T
    with ShardWriter(tmp_path, TableLayout((12,)), 0, {"rows": Field.of((4,), np.float32)}) as writer:
        writer.write(0, {"rows": wide[:, ::2]})
    found = TableReader(tmp_path).read(TableLayout((12,)), 0, 0, 12)["rows"]
    np.testing.assert_array_equal(found, wide[:, ::2])


def test_a_shard_is_not_overwritten(saved):
    directory, layout, _ = saved
    with pytest.raises(TableFileError, match=r"00000-of-00004\..* is already there: save into a new folder"):
        ShardWriter(directory, layout, 0, FIELDS)
    with pytest.raises(ValueError, match="Shard 4 is not one of 4"):
        ShardWriter(directory, layout, 4, FIELDS)


def test_every_byte_is_summed_once_and_only_when_touched(saved, monkeypatch):
    directory, layout, _ = saved
    reader, summed, crc32 = TableReader(directory), [], zlib.crc32

    def counting(data, start=0):
        summed.append(len(data))
        return crc32(data, start)

    monkeypatch.setattr(zlib, "crc32", counting)
    reader.read(layout, 1, 13, 1, names=["rows"])
    assert sum(summed) == 10 * FIELDS["rows"].row_bytes  # its chunk
    for _ in range(2):
        for shards in (3, 4):
            read(reader, TableLayout(HEADS, shards), chunk=3)
    # The last chunk of a shard, rows 100 to 103, is padding that nobody touches.
    assert sum(summed) == 4 * 100 * sum(field.row_bytes for field in FIELDS.values())


def test_memory_stays_within_three_chunks(tmp_path):
    """64 MiB of rows, in chunks of 4 MiB, there on one shard and back on three."""
    chunk, width, bound = 4 * 2**20, 64, 3 * 4 * 2**20
    layout, fields = TableLayout((100_003, 162_119)), {"rows": Field.of((width,), np.uint32)}
    rows = chunk // fields["rows"].row_bytes

    def values(logical_N):
        out = np.empty((len(logical_N), width), np.uint32)
        out[:] = logical_N[:, None]
        out += np.arange(width, dtype=np.uint32)[None] << 20
        return out

    tracemalloc.start()
    try:
        with ShardWriter(tmp_path, layout, 0, fields) as writer:
            for start in range(0, layout.rows_per_shard, rows):
                count = min(rows, layout.rows_per_shard - start)
                writer.write(start, {"rows": values(np.arange(start, start + count, dtype=np.uint32))})
        assert chunk < tracemalloc.get_traced_memory()[1] < bound
        tracemalloc.reset_peak()
        reader, thirds = TableReader(tmp_path), TableLayout(layout.head_rows, 3)
        for shard in range(3):
            for local, logical, length in thirds.runs(shard):
                for start in range(0, length, rows):
                    count = min(rows, length - start)
                    found = reader.read(thirds, shard, local + start, count)["rows"]
                    wanted = np.arange(logical + start, logical + start + count, dtype=np.uint32)
                    assert (found == values(wanted)).all()
                    del found
        assert chunk < tracemalloc.get_traced_memory()[1] < bound
        reader = TableReader(tmp_path)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        reader.read(layout, 0, rows // 2, 1)  # the checksum of a whole chunk for one row
        assert SCRATCH_BYTES <= tracemalloc.get_traced_memory()[1] - before < 1.1 * SCRATCH_BYTES
    finally:
        tracemalloc.stop()
