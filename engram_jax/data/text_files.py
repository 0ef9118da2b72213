"""Text files as documents: found by folder, glob or name, decompressed, decoded and cut, one at a time.

`.jsonl` holds one document per line, `.py` is one document, `.txt` and `.md` are cut into pieces: a piece ends at the
first blank line after `PIECE_CHARACTERS` characters (at any line end after `PIECE_LIMIT`). The cut depends on the file
alone, so a book gives a hold-out like a folder of notes does, and adding a file leaves the others' documents as they
were. For long whole documents use JSONL. `.gz` and `.zst` of all of these are read in a stream.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import zstandard

from engram_jax.config import ConfigError, require

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
COMPRESSIONS = (".gz", ".zst")
PIECE_CHARACTERS = 4_000
PIECE_LIMIT = 64_000
CHUNK_BYTES = 1 << 20


class NotUtf8Error(ConfigError):
    """A file that does not decode."""


def find_text_files(pattern: str) -> list[Path]:
    """Text files of a folder (all levels, hidden ones skipped), a glob (`**` for all levels) or a single name, sorted.

    Raises:
      ConfigError: nothing there (names the nearest existing folder), or no file with a known suffix.
    """
    path = Path(pattern).expanduser()
    if os.path.isdir(path):  # False, not an error, below a folder that one may not enter
        found = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif os.path.isfile(path):
        found = [path]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
        require(bool(found), f"data.corpus={pattern!r}: {_not_found(path)}")
    files = sorted(p for p in found if p.is_file() and _text_suffix(p) in SUFFIXES)
    require(
        bool(files),
        f"data.corpus={pattern!r}: no file there ends in {' '.join(SUFFIXES)} (or one of these + .gz, .zst).",
    )
    return files


def read_text_file(path: Path, text_key: str) -> Iterator[str]:
    """The file's documents, in order and possibly blank.

    Raises:
      NotUtf8Error: the bytes do not decode.
      ConfigError: the file cannot be read or is damaged, or a JSONL line has no text under `text_key`.
    """
    try:
        with path.open("rb") as raw:
            lines = _lines(_decompressed(raw, path.suffix))
            suffix = _text_suffix(path)
            if suffix == ".jsonl":
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield json_text(line, text_key, f"{path}, line {number}")
            elif suffix == ".py":
                yield "".join(lines)
            else:
                yield from _pieces(lines)
    except UnicodeDecodeError as error:
        raise NotUtf8Error(f"data.corpus: {path} is not UTF-8 ({error.reason}); convert it or leave it out.") from error
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"data.corpus: cannot read {path}: {error}") from error


def json_text(record: str | bytes, text_key: str, where: str) -> str:
    """The text under `text_key` of one JSON object; `where` names the record in an error."""
    try:
        value = json.loads(record)
    except ValueError as error:
        raise ConfigError(f"data.corpus: {where} is not JSON: {error}") from error
    require(isinstance(value, dict), f"data.corpus: {where} is a JSON {type(value).__name__}, not an object.")
    return text_field(value, text_key, where)


def text_field(record: dict, text_key: str, where: str) -> str:
    """The text under `text_key` of a record; bytes are UTF-8."""
    require(
        text_key in record,
        f"data.text_key={text_key!r} is not in {where}; the keys there: {', '.join(map(str, record))}.",
    )
    text = record[text_key]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise NotUtf8Error(f"data.text_key={text_key!r} of {where} is not UTF-8.") from error
    require(isinstance(text, str), f"data.text_key={text_key!r} of {where} is a {type(text).__name__}, not text.")
    # JSON can spell half a surrogate pair, which is no character and which no tokenizer takes.
    return text.encode("utf-8", "replace").decode()


def _text_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _decompressed(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _zstd_chunks(raw)
    else:
        stream = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
        yield from iter(partial(stream.read, CHUNK_BYTES), b"")


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    # Not zstandard's stream_reader: it ends without an error inside a truncated file.
    frame = None
    while data := raw.read(CHUNK_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the file ends inside a zstd frame")


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Lines with their `\\n`; `\\r\\n` becomes `\\n`, a byte order mark is dropped."""
    rest = ""
    for text in codecs.iterdecode(chunks, "utf-8-sig"):
        *lines, rest = (rest + text).split("\n")
        yield from (line.removesuffix("\r") + "\n" for line in lines)
    if rest:
        yield rest


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    piece, size = [], 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE_LIMIT or (size >= PIECE_CHARACTERS and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def _not_found(path: Path) -> str:
    """Says what exists nearest to `path`."""
    folder = next(p for p in path.absolute().parents if os.path.isdir(p))
    wanted = path.absolute().relative_to(folder).parts[0]
    try:
        names = os.listdir(folder)
    except OSError as error:
        return f"{folder} cannot be read ({error.strerror}): give a folder that you may read."
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r} there?" if near else f", which has no {wanted!r}."
    return f"no such file, folder or glob. The nearest existing folder is {folder}{hint}"
