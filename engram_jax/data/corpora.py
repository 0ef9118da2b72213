"""A corpus: documents (str) in a fixed order, and a hold-out split fixed by each document's content.

Whether a document is held out depends on nothing but its text, so the split survives reordering, added documents and
any number of processes, and a duplicate never sits on both sides.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_jax.config import ConfigError, DataConfig, require
from engram_jax.data.text_files import NotUtf8Error, find_text_files, json_text, read_text_file, text_field

# Tests and demos of the standard library; distributors differ in whether they ship them.
NOT_LIBRARY_CODE = {"test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "ensurepip"}
INSTALLED = {"site-packages", "dist-packages"}
RECORDS_PER_READ = 256


@dataclass(frozen=True)
class Corpus:
    name: str
    """`data.corpus` as configured."""
    fingerprint: str
    """sha256 over what is read and how: file names, sizes, times; not contents, so that it is known before reading."""
    read: Callable[[], Iterator[str]]
    max_documents: int = 0

    def __iter__(self) -> Iterator[str]:
        """Documents in order, blank ones dropped.

        Raises:
          ConfigError: there are none, or a file cannot be read.
        """
        documents = (text for text in self.read() if text.strip())
        count = 0
        for text in itertools.islice(documents, self.max_documents or None):
            count += 1
            yield text
        require(count > 0, f"data.corpus={self.name!r} holds no text: every document is blank.")

    def training_documents(self, holdout_fraction: float) -> Iterator[str]:
        """The documents that are not held out.

        Raises:
          ConfigError: all of them are held out.
        """
        count = 0
        for text in self:
            if not is_held_out(document_digest(text), holdout_fraction):
                count += 1
                yield text
        require(count > 0, self.empty_split_message("training", holdout_fraction))

    def empty_split_message(self, split: str, holdout_fraction: float) -> str:
        remedy = "Lower" if split == "training" else "Raise"
        return (
            f"data.corpus={self.name!r} has too few documents: none fell into the {split} split at "
            f"data.holdout_fraction={holdout_fraction}. {remedy} data.holdout_fraction or give more documents."
        )


def document_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_held_out(digest: bytes, holdout_fraction: float) -> bool:
    """Whether the document with this sha256 belongs to the hold-out: its first 64 bits as a fraction of 2^64."""
    return int.from_bytes(digest[:8], "big") < holdout_fraction * 2.0**64


def open_corpus(config: DataConfig) -> Corpus:
    """Finds `config.corpus` (see DataConfig); contents are read when it is iterated.

    Raises:
      ConfigError: unknown kind or path, nothing to read, unknown tfds dataset.
    """
    kind, _, rest = config.corpus.partition(":")
    if config.corpus in ("python", "python+packages"):
        files = _python_files(with_packages=config.corpus == "python+packages")
        return _corpus(config, files, lambda: _skip_undecodable(files))
    if kind == "tfds":
        return _tfds_corpus(config, rest)
    if kind == "arrayrecord":
        return _array_record_corpus(config, rest)
    if not os.path.exists(config.corpus) and not set("*?[/") & set(config.corpus):
        near = difflib.get_close_matches(config.corpus, ["python", "python+packages"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        require(not near, f"data.corpus={config.corpus!r} is neither a path nor a corpus; {hint}")
    files = find_text_files(config.corpus)
    return _corpus(config, files, lambda: (text for file in files for text in read_text_file(file, config.text_key)))


def _corpus(config: DataConfig, files: Sequence[Path], read: Callable[[], Iterator[str]]) -> Corpus:
    stats = [(str(file), file.stat()) for file in files]
    described = json.dumps(
        {
            "corpus": config.corpus,
            "text_key": config.text_key,
            "max_documents": config.max_documents,
            "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        }
    )
    return Corpus(config.corpus, hashlib.sha256(described.encode()).hexdigest(), read, config.max_documents)


def _python_files(with_packages: bool) -> list[Path]:
    """Python sources of the standard library, without its tests; then those of the installed packages."""
    paths = sysconfig.get_paths()
    roots = [(Path(paths["stdlib"]), NOT_LIBRARY_CODE | INSTALLED)]
    if with_packages:
        roots += [(Path(p), NOT_LIBRARY_CODE) for p in sorted({paths["purelib"], paths["platlib"]})]
    files = []
    for root, excluded in roots:
        found = ((p.relative_to(root), p) for p in root.rglob("*.py"))
        # _sysconfigdata holds the paths of the machine that built this Python.
        files += [
            p
            for relative, p in sorted(found)
            if excluded.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata")
        ]
    require(bool(files), "data.corpus='python': this Python ships no .py sources; give a folder of text instead.")
    return files


def _skip_undecodable(files: Sequence[Path]) -> Iterator[str]:
    skipped = 0
    for file in files:
        try:
            yield from read_text_file(file, text_key="")
        except NotUtf8Error:
            skipped += 1
    if skipped:
        logging.getLogger(__name__).warning("%d of %d source files are not UTF-8 and were skipped", skipped, len(files))


def _array_record_corpus(config: DataConfig, pattern: str) -> Corpus:
    """Records are UTF-8 text, or JSON objects; the first record decides for all."""
    import grain

    files = sorted(Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True))
    require(bool(files), f"data.corpus={config.corpus!r}: no file matches {pattern!r}.")

    def read() -> Iterator[str]:
        try:
            opened: Any = grain.sources.ArrayRecordDataSource([str(f) for f in files])
            with opened as source:
                parse = None
                for number, record in enumerate(_in_chunks(source)):
                    parse = parse or (json_text if _is_json_object(record) else _plain_text)
                    yield parse(record, config.text_key, f"record {number} of {pattern}")
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"data.corpus={config.corpus!r}: cannot read {pattern}: {error}") from error

    return _corpus(config, files, read)


def _tfds_corpus(config: DataConfig, spec: str) -> Corpus:
    """Split `train` of a tfds dataset in array_record format: random access without TensorFlow."""
    import tensorflow_datasets as tfds

    name, _, data_dir = spec.partition("@")
    try:
        sources: Any = tfds.data_source(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=3)
        where = f"under {data_dir}" if data_dir else "under $TFDS_DATA_DIR"
        hint = f"; nearest names: {', '.join(near)}" if near else ""
        raise ConfigError(f"data.corpus={config.corpus!r}: tfds knows no dataset {name!r} {where}{hint}.") from error
    except (ValueError, RuntimeError, NotImplementedError, ImportError, OSError, AssertionError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"data.corpus={config.corpus!r}: tfds cannot open {name!r}: {first_line} "
            "(it must be prepared with file_format='array_record')."
        ) from error
    require("train" in sources, f"data.corpus={config.corpus!r} has no split 'train', only {', '.join(sources)}.")
    source = sources["train"]

    def read() -> Iterator[str]:
        for number, record in enumerate(_in_chunks(source)):
            yield text_field(record, config.text_key, f"example {number} of tfds {name}")

    return _corpus(config, [Path(f) for f in source.dataset_info.splits["train"].filepaths], read)


def _in_chunks(source: Any) -> Iterator[Any]:
    """Records of a random-access source in order; reading many at once is about ten times as fast as one by one."""
    for start in range(0, len(source), RECORDS_PER_READ):
        yield from source.__getitems__(list(range(start, min(start + RECORDS_PER_READ, len(source)))))


def _is_json_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except ValueError:
        return False


def _plain_text(record: bytes, text_key: str, where: str) -> str:
    return text_field({text_key: record}, text_key, where)
