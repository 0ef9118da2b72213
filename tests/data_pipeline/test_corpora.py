import gzip
import hashlib
import json
import logging
import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from engram_jax.config import ConfigError, DataConfig
from engram_jax.data import corpora
from engram_jax.data.corpora import document_digest, is_held_out, open_corpus
from engram_jax.data.text_files import PIECE_CHARACTERS, PIECE_LIMIT


def read(corpus, **settings) -> list[str]:
    return list(open_corpus(DataConfig(corpus=str(corpus), **settings)))


def jsonl(texts, key="text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_records(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_folder_is_one_document_per_short_file_in_name_order(text_folder, texts):
    assert read(text_folder) == texts
    assert read(text_folder / "*.txt") == texts
    assert read(text_folder / "00*.txt") == texts[:10]
    assert read(text_folder, max_documents=5) == texts[:5]


def test_every_suffix_is_read_and_everything_else_is_not(tmp_path):
    nested = tmp_path / "a" / "b"
    nested.mkdir(parents=True)
    (nested / "1.md").write_text("one")
    (tmp_path / "z.py").write_text("two")
    (tmp_path / "z.jsonl").write_bytes(jsonl(["three", " \n", "four"]))
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    assert read(tmp_path) == ["one", "three", "four", "two"]
    assert read(tmp_path / "**" / "*.md") == ["one"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_forms_hold_the_same_documents(tmp_path, texts, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    first, second = jsonl(texts[:60], "body"), jsonl(texts[60:], "body")
    # Two compressed members in one file, as `cat a.gz b.gz` and parallel compressors write.
    (tmp_path / f"x.jsonl{suffix}").write_bytes(compress(first) + compress(second))
    assert read(tmp_path, text_key="body") == texts
    (tmp_path / f"y.txt{suffix}").write_bytes(compress(texts[3].encode()))
    assert read(tmp_path / f"y.txt{suffix}") == [texts[3]]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_file_is_an_error(tmp_path, texts, suffix):
    content = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]("".join(texts).encode())
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=re.escape(f"cannot read {path}: ")):
        read(path)


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path, texts):
    book = "\n".join(f"{i} {text}" for i, text in enumerate(texts * 20))
    path = tmp_path / "book.txt"
    path.write_text(book, encoding="utf-8")
    pieces = read(path)
    assert "".join(pieces) == book
    assert len(pieces) > 100
    for piece in pieces[:-1]:
        assert piece.endswith("\n\n")
        assert PIECE_CHARACTERS <= len(piece) <= PIECE_CHARACTERS + max(map(len, texts)) + 10
    held_out = sum(is_held_out(document_digest(piece), 0.1) for piece in pieces)
    assert 0 < held_out < len(pieces) / 2


def test_a_long_text_file_without_blank_lines_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(20_000))
    (tmp_path / "log.txt").write_text(text)
    pieces = read(tmp_path)
    assert "".join(pieces) == text
    assert all(PIECE_LIMIT <= len(piece) < PIECE_LIMIT + 20 for piece in pieces[:-1])


def test_source_files_are_never_cut(tmp_path):
    source = "x = 1\n\n" * 5_000
    (tmp_path / "long.py").write_text(source)
    assert read(tmp_path) == [source]


def test_windows_line_ends_and_byte_order_marks_leave_no_trace(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(tmp_path) == ["one\ntwo\n"]


def test_half_a_surrogate_pair_in_json_becomes_a_character_tokenizers_take(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n')
    assert read(tmp_path) == ["a? b"]


def test_python_is_the_standard_library():
    files = corpora._python_files(with_packages=False)
    assert Path(os.__file__) in files
    config = DataConfig(corpus="python", max_documents=20)
    documents = list(open_corpus(config))
    assert len(documents) == 20
    assert documents == list(open_corpus(config))


def test_python_leaves_out_tests_and_installed_packages(tmp_path, monkeypatch):
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    wanted = [library / "a.py", library / "json" / "b.py"]
    installed = [packages / "jax" / "d.py", packages / "six.py"]
    unwanted = [library / "test" / "x.py", library / "json" / "tests" / "x.py", packages / "jax" / "tests" / "x.py"]
    for file in [*wanted, *installed, *unwanted, library / "_sysconfigdata_linux.py", library / "notes.txt"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"name = {str(file)!r}")
    paths = {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    assert read("python") == [file.read_text() for file in wanted]
    assert read("python+packages") == [file.read_text() for file in wanted + installed]


def test_undecodable_library_files_are_skipped_and_counted(tmp_path, caplog):
    for name, content in {"a.py": b"x = 1\n", "b.py": b"# caf\xe9\n", "c.py": b"y = 2\n"}.items():
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(corpora._skip_undecodable(sorted(tmp_path.iterdir()))) == ["x = 1\n", "y = 2\n"]
    assert "1 of 3 source files are not UTF-8" in caplog.text


@pytest.fixture(scope="module")
def tfds_dir(texts, tmp_path_factory):
    """A dataset prepared by code the reader does not have, as one copied from another machine."""
    data_dir = tmp_path_factory.mktemp("tfds")
    with tfds.core.registered.skip_registration():

        class HouseNotes(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "title": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(texts), "test": self._generate_examples(texts[:3])}

            def _generate_examples(self, documents):
                for i, text in enumerate(documents):
                    yield i, {"text": text, "title": f"Note {i}"}

    HouseNotes(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_tfds_dataset(tfds_dir, texts):
    documents = read(f"tfds:house_notes@{tfds_dir}")
    assert sorted(documents) == sorted(texts)  # tfds shuffles what it prepares
    assert read(f"tfds:house_notes:1.0.0@{tfds_dir}", max_documents=7) == documents[:7]
    assert "tensorflow" not in sys.modules
    titles = read(f"tfds:house_notes@{tfds_dir}", text_key="title")
    assert sorted(titles) == sorted(f"Note {i}" for i in range(len(texts)))


def test_tfds_errors(tfds_dir):
    with pytest.raises(ConfigError, match=r"keys there: .*title"):
        read(f"tfds:house_notes@{tfds_dir}", text_key="body")
    with pytest.raises(ConfigError, match="tfds knows no dataset 'hous_notes' under"):
        read(f"tfds:hous_notes@{tfds_dir}")
    with pytest.raises(ConfigError, match="nearest names: imdb_reviews"):
        read("tfds:imdb_review")


@pytest.mark.parametrize("as_json", [False, True])
def test_array_records(tmp_path, texts, as_json):
    records = [json.dumps({"text": t}).encode() if as_json else t.encode() for t in texts]
    write_records(tmp_path / "a.array_record", records[:50])
    write_records(tmp_path / "b.array_record", records[50:])
    assert read(f"arrayrecord:{tmp_path}/*.array_record") == texts
    assert read(f"arrayrecord:{tmp_path}/b.array_record") == texts[50:]


def test_array_record_errors(tmp_path):
    with pytest.raises(ConfigError, match="no file matches"):
        read(f"arrayrecord:{tmp_path}/*.array_record")
    (tmp_path / "bad.array_record").write_bytes(b"not a record file" * 10_000)
    with pytest.raises(ConfigError, match="cannot read"):
        read(f"arrayrecord:{tmp_path}/bad.array_record")
    write_records(tmp_path / "json.array_record", [b'{"body": "x"}'])
    with pytest.raises(ConfigError, match="keys there: body"):
        read(f"arrayrecord:{tmp_path}/json.array_record")
    write_records(tmp_path / "binary.array_record", [b"\xff\xfe\x80"])
    with pytest.raises(ConfigError, match=r"record 0 of .* is not UTF-8"):
        read(f"arrayrecord:{tmp_path}/binary.array_record")


def test_hold_out_is_a_function_of_the_text_alone(texts):
    def reference(text: str, fraction: float) -> bool:
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16 < fraction

    for fraction in (0.02, 0.3, 0.98):
        held_out = [is_held_out(document_digest(text), fraction) for text in texts]
        assert held_out == [reference(text, fraction) for text in texts]
    # Raising the fraction only adds documents.
    small, large = ({t for t in texts if is_held_out(document_digest(t), f)} for f in (0.1, 0.3))
    assert small < large


def test_hold_out_survives_new_files_and_another_order(text_folder, texts, tmp_path):
    for i, text in enumerate(reversed(texts)):
        (tmp_path / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "new.txt").write_text("another document")
    here = set(open_corpus(DataConfig(corpus=str(text_folder))).training_documents(0.3))
    there = set(open_corpus(DataConfig(corpus=str(tmp_path))).training_documents(0.3))
    assert here == there - {"another document"}
    assert 0 < len(here) < len(texts)


def test_fingerprint_follows_the_files_and_the_settings(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    config = DataConfig(corpus=str(tmp_path))
    first = open_corpus(config).fingerprint
    assert first == open_corpus(config).fingerprint
    assert first != open_corpus(DataConfig(corpus=str(tmp_path), max_documents=1)).fingerprint
    (tmp_path / "a.txt").write_text("three")
    second = open_corpus(config).fingerprint
    (tmp_path / "b.txt").write_text("x")
    assert len({first, second, open_corpus(config).fingerprint}) == 3


@pytest.mark.parametrize(
    ("files", "corpus", "message"),
    [
        ({"notes/a.txt": b"x"}, "note/a.txt", r"did you mean 'notes' there\?"),
        ({}, "nowhere/deep/inside", "nearest existing folder is .* which has no 'nowhere'"),
        ({"a.pdf": b"x"}, "", "no file there ends in .txt"),
        ({"a.txt": b" \n\n", "b.jsonl": b'{"text": ""}\n'}, "", "every document is blank"),
        ({"a.txt": b"caf\xe9"}, "", "a.txt is not UTF-8"),
        ({"a.txt.gz": b"not gzip"}, "", "cannot read .*a.txt.gz"),
        ({"a.txt.zst": b"not zstandard"}, "", "cannot read .*a.txt.zst"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": \n'}, "", "a.jsonl, line 2 is not JSON"),
        ({"a.jsonl": b"[1]\n"}, "", "line 1 is a JSON list"),
        ({"a.jsonl": b'{"body": "x", "id": 3}\n'}, "", "data.text_key='text' is not in .*keys there: body, id"),
        ({"a.jsonl": b'{"text": 3}\n'}, "", "is a int, not text"),
    ],
)
def test_bad_input_says_what_and_where(tmp_path, files, corpus, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / corpus)


def test_a_misspelt_kind_is_corrected():
    with pytest.raises(ConfigError, match=r"did you mean 'python'\?"):
        read("pyhton")


def test_a_folder_that_one_may_not_enter_is_named(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidden)  # tests may run as root, who may enter all
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\): give a folder that you may read"):
        read(tmp_path / "books")


def test_a_glob_is_no_misspelt_kind(tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "a.py").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    assert read("python/*.py") == ["x = 1"]


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    corpus = open_corpus(DataConfig(corpus=str(tmp_path)))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*a\.txt.*Permission denied"):
        list(corpus)
