"""A run that begins where another one ended (train.init_from): a second stage, or a memory for a trained backbone.

Taken over from the source's newest checkpoint: parameters, balancing biases, and tables with every row as it stood.
New: step 0, optimizer state, schedule, sequence length, data. What the arrays mean must agree (shapes, hash constants,
tokenizer); what is said about reading and training them may differ (YaRN, dtype, optimizer, precision of rows).

A source without memory gives its parameters to a backbone of the same shape. The new tables' rows are then zero: the
memory adds exactly nothing at step 0, and later nothing for n-grams it was not trained on. Gradients reach the rows at
once through the value projection, which is not zero, and the projections as soon as rows are not. The gate's norm has
no say in that: of a key of zeros it makes zeros, and there the published square root is flat (layers/engram.py).
Measured against rows of N(0, 0.02) and a value projection of zero: experiments/LOG.md, 2026-11-24.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from engram_jax.config import (
    ConfigError,
    EngramConfig,
    MemoryConfig,
    RunConfig,
    differences,
    replace,
    require,
)
from engram_jax.data.tokenizer import load_tokenizer
from engram_jax.errors import RunError
from engram_jax.memory.description import MemoryState
from engram_jax.memory.table_index import TableFileError
from engram_jax.model import Model, Segment, named_key, segments, split
from engram_jax.registries import ROW_OPTIMIZERS
from engram_jax.runs import load, run_folder, settings
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.parts import Parts, assemble
from engram_jax.runs.state import TrainState
from engram_jax.runs.table_checkpoint import restore_tables
from engram_jax.sharding import spec

MAY_DIFFER = (
    "model.attend_across_documents",
    "model.dtype",
    "model.engram.engram_initializer_range",
    "model.hc_gate_init",
    "model.initializer_range",
    "model.loss_chunk_len",
    "model.moe.bias_update_speed",
    "model.moe.capacity_factor",
    "model.moe.implementation",
    "model.moe.seq_aux_alpha",
    "model.remat",
)
"""Fields of the model that are no matter of what its parameters are; so is model.attention.yarn."""


@dataclass(frozen=True)
class Source:
    """The run to begin with."""

    run_dir: Path
    config: RunConfig

    @property
    def has_memory(self) -> bool:
        return self.config.model.engram.enabled


def find_source(config: RunConfig) -> Source:
    """The run that `config.train.init_from` names.

    Raises:
      ConfigError: it is no run, has no checkpoint, or its model is another.
    """
    run_dir = Path(config.train.init_from).expanduser()
    named = f"train.init_from={config.train.init_from!r}"
    require(
        (run_dir / "config.json").is_file(),
        f"{named} is not a run: it has no config.json. Train it, or give its folder.",
    )
    theirs = settings.read_config(run_dir)
    require(
        load.has_checkpoint(run_dir),
        f"{named} has no checkpoint yet: let that run reach its first one.",
    )
    _check_model(config, theirs, named)
    rule = config.optimizer.table_optimizer
    require(
        theirs.model.engram.enabled or not config.model.engram.enabled or ROW_OPTIMIZERS[rule].moves_rows,
        f"optimizer.table_optimizer={rule}, but {named} has no memory: new tables are zero and would stay so.",
    )
    return Source(run_dir, theirs)


def _check_model(ours: RunConfig, theirs: RunConfig, named: str) -> None:
    theirs = _with_model_of(theirs, ours)
    if not theirs.model.engram.enabled:
        ours, theirs = (replace(run, model__engram=EngramConfig()) for run in (ours, theirs))
    elif not ours.model.engram.engram_compressed_vocab_size:  # 0: not looked up yet; the hash constants decide later
        theirs = replace(theirs, model__engram__engram_compressed_vocab_size=0)
    lines = [line for line in differences(ours, theirs) if not line.startswith(MAY_DIFFER)]
    require(
        not lines,
        f"{named} has another model, whose parameters would mean nothing in this one ({'; '.join(lines)[:600]}). "
        "Give this run the source's model settings; the context's (model.attention.yarn), precision, optimizer and "
        "data may be its own.",
    )


def data_tokenizer(config: RunConfig, run_dir: Path) -> str:
    """The tokenizer.json to use: the configured one; else that of this run, once it has one, or of the source."""
    if config.data.tokenizer or not config.train.init_from:
        return config.data.tokenizer
    own = run_dir / "tokenizer.json"
    return str(own if own.is_file() else Path(config.train.init_from).expanduser() / "tokenizer.json")


def initial_state(parts: Parts, source: Source, tokenizer: Tokenizer, log: Callable[[str], None] = print) -> TrainState:
    """Step 0 of a run that begins with `source`. Call under `jax.set_mesh(parts.mesh)`.

    The source's optimizer state is read, as Orbax reads whole trees, and dropped before this run's is made; tables are
    read from their files in chunks.

    Raises:
      ConfigError: the source's tokenizer is another.
      RunError: its checkpoint cannot be read, or its memory was addressed otherwise.
    """
    named = f"train.init_from={parts.config.train.init_from!r}"
    trained_with = load_tokenizer(source.run_dir / "tokenizer.json").backend
    require(
        tokenizer.to_str() == trained_with.to_str(),
        f"{named} was trained with another tokenizer than this run's: leave data.tokenizer empty to take the source's.",
    )
    theirs = _source_parts(parts, source.config, tokenizer)
    with Checkpoints(
        source.run_dir / "checkpoints", theirs.config.checkpoint, theirs, log, read_only=True
    ) as checkpoints:
        metas: list[dict[str, Any]] = []

        def can_be_read(saved: dict[str, Any]) -> None:
            run_folder.check_readable(saved, theirs)
            metas.append(saved)

        read = checkpoints.restore(theirs.abstract_state(), can_be_read, tables=False)
    if read is None:
        raise ConfigError(f"{named} has no checkpoint yet: let that run reach its first one.")
    step, params, buffers, rows_used = int(read.step), read.params, read.buffers, read.memory.rows_used
    del read  # the optimizer state of the source
    if metas[-1].get("imported_from"):  # its tables hold no counts of uses: every row counts when it is first used here
        rows_used = parts.store.none_used()

    cut = (segments(theirs.config.model), segments(parts.config.model))
    key = jax.random.key(parts.config.train.seed)
    params, buffers = jax.jit(lambda *trees: tuple(_recut(tree, *cut) for tree in trees))(params, buffers)
    if parts.store.layers and not source.has_memory:
        params |= {"engram": _new_readers(parts, named_key(key, "model"))}
        memory = with_changes(parts.store, init_std=0.0).init(named_key(key, "memory"))
    elif parts.store.layers:
        folder = load.tables_of(source.run_dir, step)
        try:
            tables = restore_tables(folder, parts.store, parts.mesh, theirs.store, step)
        except (TableFileError, OSError) as error:
            raise RunError(f"{named}: its tables cannot be read ({error}). Restore that run from a copy.") from error
        memory = MemoryState(tables, rows_used)
    else:
        memory = MemoryState({}, {})
    log(f"Begins with step {step} of {source.run_dir}: parameters{' and tables' if source.has_memory else ''}.")

    if remark := _context_remark(parts.config, source.config):
        log(remark)

    def begin(params: dict, buffers: dict) -> TrainState:
        zero = jnp.zeros((), jnp.int32, out_sharding=spec())
        return TrainState(zero, params, buffers, parts.optimizer.init(params), MemoryState({}, {}))

    state = jax.jit(begin, donate_argnums=(0, 1))(params, buffers)
    return TrainState(state.step, state.params, state.buffers, state.opt_state, memory)


def _with_model_of(theirs: RunConfig, ours: RunConfig) -> RunConfig:
    """Our run of their model, but for our context: theirs may be too short for our sequences."""
    return replace(ours, model=replace(theirs.model, attention__yarn=ours.model.attention.yarn))


def _context_remark(ours: RunConfig, theirs: RunConfig) -> str:
    """What is odd about the stage's context; it may be meant."""
    trained, yarn = theirs.data.seq_len, ours.model.attention.yarn
    if theirs.model.attention.yarn.enabled:
        return ""
    if not yarn.enabled and ours.data.seq_len > trained:
        return (
            f"warning: data.seq_len={ours.data.seq_len}, and the source was trained at {trained} without YaRN: see "
            "model.attention.yarn.factor."
        )
    if yarn.enabled and yarn.original_max_position_embeddings != trained:
        return (
            f"warning: model.attention.yarn.original_max_position_embeddings={yarn.original_max_position_embeddings}, "
            f"and the source was trained at {trained}."
        )
    return ""


def _source_parts(parts: Parts, theirs: RunConfig, tokenizer: Tokenizer) -> Parts:
    """The source's parts on this run's mesh: its model, and the rules by which its state and rows are to be read."""
    return assemble(
        replace(
            _with_model_of(theirs, parts.config),
            optimizer=theirs.optimizer,
            memory=MemoryConfig(row_dtype=theirs.memory.row_dtype),
            train__steps=theirs.train.steps,
        ),
        tokenizer,
        list(parts.mesh.devices.flat),
    )


def _recut(tree: dict[str, Any], theirs: list[Segment], ours: list[Segment]) -> dict[str, Any]:
    """Stacks of blocks, cut where our Engram layers are instead of theirs: the same blocks in the same order."""
    if theirs == ours or "blocks" not in tree:
        return tree
    blocks = {}
    for segment in ours:
        parts = [
            jax.tree.map(lambda x, lo=max(segment.start, s.start) - s.start, hi=segment.stop - s.start: x[lo:hi], stack)
            for s in theirs
            if s.start < segment.stop and segment.start < s.stop and (stack := tree["blocks"].get(s.name))
        ]
        if parts:
            blocks[segment.name] = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts) if len(parts) > 1 else parts[0]
    return tree | {"blocks": blocks}


def _new_readers(parts: Parts, key: jax.Array) -> dict[str, Any]:
    return jax.jit(lambda: split(Model(parts.config.model, key))[1]["engram"])()
