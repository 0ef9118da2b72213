"""Tables on disk that are damaged, foreign or unfinished are refused, and say what is wrong."""

import json
import os
import resource
import subprocess
import sys
import zlib

import ml_dtypes
import numpy as np
import pytest
from saved_tables import FIELDS, HEADS, assert_same, junk, place, random_rows, read, rows_of, write, zeros

from engram_jax.memory.table import TableLayout
from engram_jax.memory.table_files import ShardWriter, TableReader
from engram_jax.memory.table_index import Field, TableFileError

pytestmark = pytest.mark.newest


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def refusal(directory, layout):
    """Why the table can't be read, or what it holds."""
    try:
        return read(TableReader(directory), layout, chunk=100)
    except TableFileError as error:
        return str(error)


def test_every_damaged_byte_is_found_or_does_not_matter(saved):
    """One byte at a time, in data and indexes alike: refused by the file's name, or the same rows."""
    directory, layout, logical = saved
    rng, wanted, refused = np.random.default_rng(3), place(logical, HEADS, 4, zeros), 0
    for path in sorted(directory.iterdir()):
        for position in rng.choice(path.stat().st_size, 6, replace=False).tolist():
            flip(path, position)
            found = refusal(directory, layout)
            if isinstance(found, str):
                assert path.name in found
                refused += 1
            else:
                assert_same(found, wanted)
                # White space, or the last chunk: rows 100 to 103 of a shard are padding.
                assert path.suffix == ".json" or position >= path.stat().st_size * 100 // 104
            flip(path, position)
    assert refused > 120
    assert_same(refusal(directory, layout), wanted)


def test_damage_is_told_by_file_chunk_and_logical_rows(tmp_path):
    """Heads of 12 and 9 rows on 2 shards: shard 1 holds rows 6..11 and 17..20, then 5 rows of padding (16 - 11)."""
    layout = TableLayout((12, 9), 2)
    placed = place(random_rows(21, seed=1), (12, 9), 2, junk)
    write(tmp_path, layout, placed, chunk=4)
    flip(tmp_path / "00001-of-00002.uses.bin", 5 * 4)  # local row 5
    reader = TableReader(tmp_path)
    reader.read(layout, 0, 0, 16)
    reader.read(layout, 1, 0, 4)  # not touched: the damage is not this caller's
    reader.read(layout, 1, 4, 4, names=["rows"])
    with pytest.raises(TableFileError) as error:
        reader.read(layout, 1, 0, 16)
    assert f"{tmp_path}/00001-of-00002.uses.bin is damaged in chunk 1" in str(error.value)
    assert "(local rows 4..7, logical rows 10..11, 17..18)" in str(error.value)
    assert "Restore an earlier checkpoint" in str(error.value)
    with pytest.raises(TableFileError, match=r"logical rows 10\.\.11, 17\.\.18"):
        TableReader(tmp_path).read(TableLayout((12, 9)), 0, 11, 1)


@pytest.mark.parametrize(
    ("start", "count", "verified"), [(0, 3, False), (18, 3, False), (18, 32, False), (30, 3, False), (18, 3, True)]
)
def test_a_file_that_shrinks_after_opening_is_damage(tmp_path, start, count, verified):
    """Before, in or after the rows asked for, and in a verified chunk; of zeros, which an unread buffer looks like."""
    layout, field = TableLayout((50,)), Field.of((4,), np.float32)
    with ShardWriter(tmp_path, layout, 0, {"rows": field}) as writer:
        writer.write(0, {"rows": np.zeros((50, 4), np.float32)})
    reader = TableReader(tmp_path)
    if verified:
        reader.read(layout, 0, 0, 1)
    os.truncate(tmp_path / "00000-of-00001.rows.bin", 20 * field.row_bytes)
    with pytest.raises(TableFileError, match=r"00000-of-00001\.rows\.bin is damaged in chunk 0"):
        reader.read(layout, 0, start, count)


def truncate(directory):
    path = directory / "00001-of-00004.slots.m.bin"
    os.truncate(path, path.stat().st_size - 1)


def swap(directory, left, right):
    (directory / left).rename(directory / "kept")
    (directory / right).rename(directory / left)
    (directory / "kept").rename(directory / right)


def other_table(directory):
    for path in directory.glob("00003-*"):
        path.unlink()
    heads = (101, 5, 3, 211, 71)
    write(directory, TableLayout(heads, 4), place(random_rows(sum(heads), 1), heads, 4, zeros), 50, shards=(3,))


def other_fields(directory):
    path = directory / "00003-of-00004.json"
    table = json.loads(path.read_text())["table"]
    table["fields"]["uses"]["dtype"] = "uint32"
    crc = zlib.crc32(json.dumps(table, sort_keys=True).encode())
    path.write_text(json.dumps({"table": table, "crc32": crc}))


def both(directory):
    write(directory, TableLayout(HEADS, 2), place(random_rows(sum(HEADS), 1), HEADS, 2, zeros), 50)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "00002-of-00004.json").unlink(), "incomplete: 1 of its 4 shards .* the first is shard 2"),
        (lambda d: (d / "00002-of-00004.rows.bin").unlink(), r"00002-of-00004\.rows\.bin is missing"),
        (truncate, r"00001-of-00004\.slots\.m\.bin has [\d,]+ bytes where [\d,]+ were"),
        (lambda d: (d / "00001-of-00004.json").write_text("{"), r"00001-of-00004\.json can't be read"),
        (lambda d: (d / "00001-of-00004.json").write_text("[]"), r"00001-of-00004\.json can't be read"),
        (lambda d: swap(d, "00001-of-00004.json", "00002-of-00004.json"), r"00001-of-00004\.json describes shard 2 of"),
        (other_table, r"00003-of-00004\.json describes shard 3 of .*71.*differs from .* the other shards"),
        (other_fields, r"00003-of-00004\.json has other fields"),
        (both, r"several tables, with \[2, 4\] shards"),
        (lambda d: [path.unlink() for path in d.glob("*.json")], "holds no table"),
    ],
)
def test_a_folder_that_is_not_one_whole_table_is_refused(saved, damage, message):
    damage(saved[0])
    with pytest.raises(TableFileError, match=message):
        TableReader(saved[0])


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TableFileError, match="holds no table"):
        TableReader(tmp_path)
    with pytest.raises(TableFileError, match="holds no table"):
        TableReader(tmp_path / "absent")


def test_swapped_shard_files_are_damage(saved):
    directory, layout, _ = saved
    swap(directory, "00000-of-00004.rows.bin", "00001-of-00004.rows.bin")
    with pytest.raises(TableFileError, match=r"00000-of-00004\.rows\.bin is damaged in chunk 0"):
        TableReader(directory).read(layout, 0, 0, 1)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((101, 5, 3, 211), "5 heads instead of 4"),
        ((101, 5, 7, 211, 67), "3 rows in head 2 instead of 7.*every row would be wrong.*a table can't grow"),
        ((1, 100, 5, 3, 211, 67), "5 heads instead of 6"),
    ],
)
def test_other_heads_are_refused(saved, heads, message):
    reader = TableReader(saved[0])
    with pytest.raises(TableFileError, match=message):
        reader.check(TableLayout(heads, 4), FIELDS)
    with pytest.raises(TableFileError, match=message):
        reader.read(TableLayout(heads, 4), 0, 0, 1)


def test_other_fields_are_refused(saved):
    reader, layout = TableReader(saved[0]), TableLayout(HEADS, 3)
    reader.check(layout, FIELDS)
    with pytest.raises(TableFileError, match=r"no field 'slots\.v'"):
        reader.check(layout, FIELDS | {"slots.v": Field.of((4,), np.float32)})
    with pytest.raises(TableFileError, match="an unexpected field 'uses'"):
        reader.check(layout, {name: field for name, field in FIELDS.items() if name != "uses"})
    with pytest.raises(TableFileError, match=r"'rows' as bfloat16\[4\] instead of float32\[4\]\. Restore with"):
        reader.check(layout, FIELDS | {"rows": Field.of((4,), np.float32)})
    with pytest.raises(TableFileError, match=r"'rows' as bfloat16\[4\] instead of bfloat16\[5\]"):
        reader.check(layout, FIELDS | {"rows": Field.of((5,), ml_dtypes.bfloat16)})


def give_up(directory, rows, error=None):
    with ShardWriter(directory, TableLayout(HEADS, 4), 0, FIELDS) as writer:
        writer.write(0, rows_of(0, rows))
        if error:
            raise error


def test_a_shard_given_up_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        give_up(tmp_path, 104, KeyboardInterrupt())
    with pytest.raises(ValueError, match="has 103 of its 104 rows, padding included"):
        give_up(tmp_path, 103)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_writer_leaves_no_table(saved):
    """A process that ends after its last write, before close: all the bytes are there, and no table."""
    directory, layout, _ = saved
    for path in directory.glob("00003-*"):
        path.unlink()
    program = f"""
import os
import numpy as np
from engram_jax.memory.table import TableLayout
from engram_jax.memory.table_files import ShardWriter
from engram_jax.memory.table_index import Field
fields = {FIELDS!r}
writer = ShardWriter({str(directory)!r}, {layout!r}, 3, fields)
writer.write(0, {{name: np.ones((104, *f.row_shape), f.np_dtype) for name, f in fields.items()}})
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    for name, field in FIELDS.items():
        assert (directory / f"00003-of-00004.{name}.bin").stat().st_size == 104 * field.row_bytes
    with pytest.raises(TableFileError, match="incomplete: 1 of its 4 shards have no index, the first is shard 3"):
        TableReader(directory)
    with pytest.raises(TableFileError, match="already there"):
        ShardWriter(directory, layout, 3, FIELDS)


def test_data_is_on_the_disk_before_the_index_has_its_name(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, os.replace

    def fsync(descriptor):
        names = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.iterdir())}
        events.append(names[os.fstat(descriptor).st_ino])
        sync(descriptor)

    def replace(source, target):
        events.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with ShardWriter(tmp_path, TableLayout(HEADS, 4), 0, FIELDS) as writer:
        writer.write(0, rows_of(0, 104))
    data = [f"00000-of-00004.{name}.bin" for name in FIELDS]
    assert events == [*data, "00000-of-00004.json.part", "renamed", tmp_path.name]


def test_a_failed_rename_is_no_table(tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(5, "Input/output error", str(target))

    monkeypatch.setattr(os, "replace", replace)
    writer = ShardWriter(tmp_path, TableLayout((12,)), 0, {"rows": Field.of((), np.int8)})
    writer.write(0, {"rows": np.ones(12, np.int8)})
    with pytest.raises(OSError, match=r"00000-of-00001\.json"):
        writer.close()
    with pytest.raises(TableFileError, match="holds no table"):
        TableReader(tmp_path)


def test_a_full_disk_names_the_file_and_leaves_no_table(tmp_path):
    """A limit on file sizes stands for the disk: the kernel takes a part of the write and refuses the rest."""
    layout, fields = TableLayout((3000,)), {"uses": Field.of((), np.int32), "rows": Field.of((256,), np.float32)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ShardWriter(tmp_path, layout, 0, fields)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"00000-of-00001\.rows\.bin"):
            writer.write(0, {"uses": np.ones(3000, np.int32), "rows": np.ones((3000, 256), np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(ValueError, match="closed or was aborted"):
        writer.close()
    assert not list(tmp_path.iterdir())
