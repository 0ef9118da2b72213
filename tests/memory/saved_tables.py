"""Tables on disk, written and read row by row, for the tests of their files."""

import ml_dtypes
import numpy as np

from engram_jax.memory.table_files import ShardWriter
from engram_jax.memory.table_index import Field

HEADS = (101, 5, 3, 211, 67)
FIELDS = {
    "rows": Field.of((4,), ml_dtypes.bfloat16),
    "coarse": Field.of((3,), ml_dtypes.float8_e4m3fn),
    "uses": Field.of((), np.int32),
    "slots.m": Field.of((4,), np.float32),
    "slots.square": Field.of((2, 2), np.float64),
}


def random_rows(count, seed):
    """Every bit pattern, NaNs with payloads included."""
    rng = np.random.default_rng(seed)
    return {
        name: np.frombuffer(rng.bytes(count * field.row_bytes), field.np_dtype).reshape(count, *field.row_shape)
        for name, field in FIELDS.items()
    }


def rows_of(start, count):
    return {name: array[start : start + count] for name, array in random_rows(500, 2).items()}


def place(logical, head_rows, shards, padding):
    """[shards, R, ...] from logical rows, one row at a time: the oracle. `padding` fills the rows that don't exist."""
    pieces = [-(-rows // shards) for rows in head_rows]
    rows_per_shard = sum(pieces) if shards == 1 else -(-sum(pieces) // 8) * 8
    placed = {name: padding(a, (shards, rows_per_shard, *a.shape[1:])) for name, a in logical.items()}
    row = 0
    for head, rows in enumerate(head_rows):
        for in_head in range(rows):
            for name, array in logical.items():
                placed[name][in_head // pieces[head], sum(pieces[:head]) + in_head % pieces[head]] = array[row]
            row += 1
    return placed


def zeros(array, shape):
    return np.zeros(shape, array.dtype)


def junk(array, shape):
    return np.frombuffer(b"\xa5" * int(np.prod(shape)) * array.itemsize, array.dtype).reshape(shape).copy()


def write(directory, layout, placed, chunk, shards=None):
    for shard in range(layout.shards) if shards is None else shards:
        with ShardWriter(directory, layout, shard, FIELDS) as writer:
            for start in range(0, layout.rows_per_shard, chunk):
                writer.write(start, {name: array[shard, start : start + chunk] for name, array in placed.items()})


def read(reader, layout, chunk):
    """[shards, R, ...] of every field, in chunks."""
    shards = []
    for shard in range(layout.shards):
        starts = range(0, layout.rows_per_shard, chunk)
        parts = [reader.read(layout, shard, s, min(chunk, layout.rows_per_shard - s)) for s in starts]
        shards.append({name: np.concatenate([part[name] for part in parts]) for name in FIELDS})
    return {name: np.stack([shard[name] for shard in shards]) for name in FIELDS}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name].shape, left[name].dtype) == (right[name].shape, right[name].dtype), name
        assert left[name].tobytes() == right[name].tobytes(), name
