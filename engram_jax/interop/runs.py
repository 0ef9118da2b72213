"""A whole run as a Hugging Face folder, and back: config.json, tokenizer.json, safetensors files (names.py, shards.py).

Tables pass as logical rows in chunks, from checkpoint to file and from file to checkpoint; none is ever in memory. What
a folder lacks of a run is the optimizer's state, so an imported run can be read and trained on, not continued.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ConfigError, ModelConfig, RunConfig, from_dict, require
from engram_jax.data.tokenizer import Tokenizer, load_tokenizer
from engram_jax.errors import RunError
from engram_jax.files import write_json
from engram_jax.interop.names import Tree, Weight, table_name, weights
from engram_jax.interop.shards import AGAIN, Folder, Source, Tensor, write
from engram_jax.memory import hashing
from engram_jax.memory.description import MemoryState
from engram_jax.memory.hashing import HashConstants
from engram_jax.memory.store import MemoryStore
from engram_jax.memory.table import TableState
from engram_jax.memory.table_files import ShardWriter, TableReader, rows_per_chunk
from engram_jax.registries import ATTENTION
from engram_jax.runs import run_folder
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.load import load_run, on_one_device, tables_of
from engram_jax.runs.parts import Parts, assemble
from engram_jax.runs.state import TrainState
from engram_jax.runs.table_checkpoint import fields_of
from engram_jax.version import __version__

FORMAT = 1
"""Of names, layouts and config.json's `engram_jax` block; raised by a change that older code would read wrongly."""
Log = Callable[[str], None]


# --- export ---


def export_run(
    run_dir: Path | str, folder: Path | str, dtype: Literal["float32", "bfloat16"] = "float32", log: Log = print
) -> list[Path]:
    """Writes a run's newest checkpoint as a Hugging Face folder; returns its safetensors files.

    Args:
      run_dir: the run's folder.
      folder: the folder to write; it must not exist yet.
      dtype: of the numbers in the files. float32 is exact. In bfloat16 the hyper-connections' coefficients and the
        experts' biases stay float32, as they are computed with.

    Raises:
      ConfigError: the folder exists already.
      RunError: the run cannot be read, or the disk has no room.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    state, parts = load_run(run_dir, log, tables=False)
    step, store = int(state.step), parts.store
    tree = _joined(jax.device_get(state.params), jax.device_get(state.buffers))

    def source(weight: Weight) -> Source:
        kept = "float32" if weight.stays_float32 else dtype
        return Source(weight.name, weight.shape, kept, lambda: [weight.to_file(tree)])

    sources = [source(weight) for weight in weights(parts.config.model)]
    for layer in store.layers:
        reader = TableReader(tables_of(run_dir, step) / layer)
        reader.check(store.layouts[layer], fields_of(store))
        shape = (store.num_rows(layer), store.config.engram_head_dim)
        sources.append(Source(table_name(layer), shape, dtype, partial(_rows, store, reader, layer, step)))
    saved = json.loads((run_dir / "config.json").read_text())
    config = hf_config(parts.config.model, load_tokenizer(run_dir / "tokenizer.json"), dtype)
    config["engram_jax"] = {
        "format": FORMAT,
        "version": __version__,
        "step": step,
        "run": saved,
        "hash_constants": store.constants.to_dict(),
        "rows_used": {layer: int(used) for layer, used in state.memory.rows_used.items()},
    }
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": (run_dir / "tokenizer.json").read_text(encoding="utf-8"),
    }
    files = write(folder, sources, texts)
    size = sum(file.stat().st_size for file in files)
    log(f"{folder}: {len(sources)} tensors of step {step} in {len(files)} files, {size / 1e9:.2f} GB.")
    return files


def hf_config(model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The model's settings, flat, under DeepSeek's names, as transformers' configurations are."""
    groups = dataclasses.asdict(model)
    attention, moe, engram = (groups.pop(name) for name in ("attention", "moe", "engram"))
    here_only = ("dtype", "remat", "loss_chunk_len", "implementation", "capacity_factor", "kind")
    flat = {name: value for name, value in (groups | attention | moe | engram).items() if name not in here_only}
    yarn = flat.pop("yarn")
    return {
        "architectures": ["EngramForCausalLM"],
        "model_type": "engram_jax",
        "dtype": dtype,
        **flat,
        "attention_kind": attention["kind"],
        "hidden_act": "silu",
        "rope_scaling": {"type": "yarn", **yarn} if yarn["factor"] > 1 else None,
        "rope_interleave": any(weight.rope_width for weight in ATTENTION[model.attention.kind].weights(model)),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _rows(store: MemoryStore, reader: TableReader, layer: str, step: int) -> Iterator[np.ndarray]:
    """A table's rows as they stand at `step`, in chunks. On one shard, local rows are logical ones."""
    layout, count = store.layouts[layer], rows_per_chunk(reader.fields)
    read = jax.jit(lambda rows, slots: store.optimizer.read(rows, slots, jnp.int32(step))[0])
    for start in range(0, layout.num_rows, count):
        fields = reader.read(layout, 0, start, min(count, layout.num_rows - start))
        slots = {name.removeprefix("slots."): x for name, x in fields.items() if name.startswith("slots.")}
        yield np.asarray(read(fields["rows"], slots))


def _joined(params: Tree, buffers: Tree) -> Tree:
    """One tree of both: they share branches, no leaves."""
    tree = dict(params)
    for name, value in buffers.items():
        tree[name] = _joined(tree[name], value) if name in tree else value
    return tree


# --- import ---


def import_run(folder: Path | str, run_dir: Path | str, log: Log = print) -> None:
    """Makes a run from a folder that `export_run` wrote; `load_run` reads it. The run's folder appears when complete.

    Args:
      folder: the folder that `export_run` wrote.
      run_dir: the run's folder to write; it must not exist yet. The run has no optimizer state, so it cannot be
        resumed; `TrainConfig.init_from` begins a new run with it.

    Raises:
      ConfigError: the run's folder exists already, or `export_run` did not write the folder.
      RunError: a file is missing, cut short or of another checkpoint; the message names file and tensor.
    """
    folder, run_dir = Path(folder), Path(run_dir)
    require(not run_dir.exists(), f"{run_dir} is there already: give a new folder, or delete that one.")
    files = Folder(folder)
    block = _block(files)
    config = from_dict(RunConfig, block["run"])
    require((folder / "tokenizer.json").exists(), f"{folder} has no tokenizer.json. {AGAIN}")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    parts = assemble(on_one_device(config), tokenizer.backend, jax.devices()[:1])
    if lines := hashing.differences(parts.store.constants, HashConstants.from_dict(block["hash_constants"])):
        raise RunError(
            f"{folder / 'tokenizer.json'} or the engram_* settings of config.json are not those of the tensors, so "
            f"every row would be wrong ({'; '.join(lines)[:600]}). {AGAIN}"
        )
    tables = {
        layer: files.get(table_name(layer), (parts.store.num_rows(layer), parts.store.config.engram_head_dim))
        for layer in parts.store.layers
    }
    with jax.set_mesh(parts.mesh):
        state = _state(parts, files, block)
        part = run_dir.with_name(run_dir.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            shutil.copyfile(folder / "tokenizer.json", part / "tokenizer.json")
            write_json(part / "config.json", block["run"])
            with Checkpoints(part / "checkpoints", config.checkpoint, parts, log) as checkpoints:
                meta = {
                    "format": run_folder.FORMAT,
                    "version": __version__,
                    "config": block["run"],
                    "hash_constants": block["hash_constants"],
                    "vocab_sha256": tokenizer.vocab_sha256,
                    "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
                    "corpus_sha256": "",
                    "imported_from": str(folder),
                }
                checkpoints.save(block["step"], state, meta, partial(write_tables, parts.store, tables))
                checkpoints.wait()
            part.rename(run_dir)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    log(f"{run_dir}: step {block['step']} of {config.name}, from {folder}.")


def _block(files: Folder) -> dict[str, Any]:
    config = files.config()
    block = config.get("engram_jax")
    if block is None:
        raise ConfigError(
            f"{files.path / 'config.json'} has no engram_jax block (model_type={config.get('model_type')!r}): only "
            "folders that engram-jax export wrote are whole runs. The memory of a DeepSeek-V4.1 or Qwen checkpoint "
            "is read by engram_jax.interop.foreign (docs/interchange.md)."
        )
    if block["format"] > FORMAT:
        raise RunError(
            f"{files.path} was written by engram_jax {block['version']} in format {block['format']}, and this is "
            f"{__version__}, which reads formats up to {FORMAT}: use that version or a newer one."
        )
    return block


def _state(parts: Parts, files: Folder, block: dict[str, Any]) -> TrainState:
    """The state without tables. Call under the run's mesh."""
    model = parts.config.model
    abstract = parts.abstract_state()
    params, buffers = jax.tree.map(lambda x: np.empty(x.shape, np.float32), (abstract.params, abstract.buffers))
    tree, known = _joined(params, buffers), {table_name(layer) for layer in parts.store.layers}
    for weight in weights(model):
        weight.from_file(files.get(weight.name, weight.shape).read(), tree)
        known.add(weight.name)
    if unknown := sorted(set(files.tensors) - known):
        raise RunError(
            f"{files.tensors[unknown[0]].file}: config.json describes a model without {unknown[0]} (and "
            f"{len(unknown) - 1} other tensors): the files and config.json are not of one checkpoint."
        )
    params, buffers = jax.device_put(
        (params, buffers), jax.tree.map(lambda x: x.sharding, (abstract.params, abstract.buffers))
    )
    used = {layer: jnp.int32(block["rows_used"][layer]) for layer in parts.store.layers}
    opt_state = jax.jit(parts.optimizer.init)(params)
    state = TrainState(jnp.int32(block["step"]), params, buffers, opt_state, MemoryState({}, used))
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)


def write_tables(store: MemoryStore, tables: dict[str, Tensor], directory: Path) -> None:
    """Table files of tensors of logical rows, with new optimizer state; for a store of one shard."""
    for layer, tensor in tables.items():
        write_table(store, layer, directory, tensor.rows)


def write_table(store: MemoryStore, layer: str, directory: Path, rows: Callable[[int, int], np.ndarray]) -> None:
    """The table file of an Engram layer: `rows(start, count)` gives logical rows, in any float dtype."""
    fields, num_rows = fields_of(store), store.num_rows(layer)
    count = min(rows_per_chunk(fields), num_rows)

    @jax.jit
    def new_rows(rows_UD: jax.Array) -> TableState:
        return store.new_rows(rows_UD.astype(store.row_dtype))

    with ShardWriter(directory / layer, store.layouts[layer], 0, fields) as writer:
        for start in range(0, num_rows, count):
            new: Any = jax.device_get(new_rows(rows(start, min(count, num_rows - start))))
            slots = {f"slots.{name}": x for name, x in new.slots.items()}
            writer.write(start, {"rows": new.rows, "uses": new.uses, **slots})
