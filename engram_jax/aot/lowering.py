"""Compiles the steps of a run for chips that this machine does not have: arguments are shapes, and no array is made.

The steps are those of a run (training/step.py), with the arguments that training/stepper.py gives them. Compiling for
TPUs needs libtpu; call it in its own process (child.py).
"""

from __future__ import annotations

import math
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from tokenizers import Tokenizer, models

from engram_jax.config import RunConfig
from engram_jax.inference.cache import Cache, new_cache
from engram_jax.inference.engine import check_decodes, next_logits
from engram_jax.inference.served import Served, served
from engram_jax.memory.description import LoadedRows, MemoryPlan
from engram_jax.memory.plan import capacity
from engram_jax.memory.routing import safe_capacity
from engram_jax.runs.parts import Parts, assemble
from engram_jax.runs.state import Batch, TrainState
from engram_jax.sharding import BATCH, spec
from engram_jax.training.planner import Planner
from engram_jax.training.step import make_eval_step, make_train_step
from engram_jax.training.stepper import reads_ahead

PROGRAMS = ("train", "eval")
DECODE = "decode"
"""Optional program: decodes a token for each of data.batch_size sequences, with caches of data.seq_len places."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """Arguments of the training and the evaluation step, as shapes with shardings on the chips."""

    state: TrainState
    batch: Batch
    plan: MemoryPlan
    loaded: LoadedRows | None
    """The batch's rows, if they are read before the step: rows are read ahead, or tables lie outside the program."""

    def named(self) -> dict[str, Any]:
        return {"state": self.state, "batch": self.batch, "plan": self.plan, "loaded": self.loaded}


@dataclass(frozen=True, eq=False)
class DecodeArguments:
    """Arguments of one step of decoding (inference/engine.py), as shapes with shardings on the chips."""

    served: Served
    cache: Cache
    token_B: jax.ShapeDtypeStruct
    is_drawn_B: jax.ShapeDtypeStruct

    def named(self) -> dict[str, Any]:
        return {"served": self.served, "cache": self.cache}


def stand_in_tokenizer(vocab_size: int, canonical_size: int = 0) -> Tokenizer:
    """A tokenizer with `vocab_size` tokens that compress to `canonical_size` ids (0: no token is compressed).

    Shapes depend on these two numbers only: the rows of a head are primes near `engram_vocab_size`.
    """
    distinct = canonical_size or vocab_size
    vocabulary = {f"t{i % distinct}" + " " * (i // distinct): i for i in range(vocab_size)}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))


def make_parts(config: RunConfig, devices: Sequence[Any]) -> Parts:
    """The parts of the run on these devices.

    Raises:
      ConfigError: the run does not fit the devices.
    """
    canonical = config.model.engram.engram_compressed_vocab_size
    return assemble(config, stand_in_tokenizer(config.model.vocab_size, canonical), list(devices))


def arguments(parts: Parts) -> Arguments:
    """Arguments of a run's steps. Call under `jax.set_mesh(parts.mesh)`."""

    on_chips = partial(_on_chips, parts)
    store, data = parts.store, parts.config.data
    by_batch = NamedSharding(parts.mesh, spec("batch", "seq"))  # type: ignore[arg-type]
    tokens = jax.ShapeDtypeStruct((data.batch_size, data.seq_len), jnp.int32, sharding=by_batch)
    batch: Any = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), tokens)
    plan = on_chips(jax.eval_shape(Planner(store).start, batch))
    state = parts.abstract_state()
    if not store.placement.in_program:
        loaded = {layer: jax.eval_shape(store.new_rows, _rows(parts, layer, plan)) for layer in store.layers}
        by_owner = NamedSharding(parts.mesh, jax.P(parts.mesh.axis_names))
        loaded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_owner), loaded)
        return Arguments(state, batch, plan, loaded)

    def at_rest(rest: Any, part: Any) -> Any:
        """An array of a table with the sharding that its placement gives it; None: in device memory."""
        return on_chips(part) if rest is None else jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=rest)

    tables = {
        layer: jax.tree.map(at_rest, store.at_rest(layer), table, is_leaf=lambda x: x is None)
        for layer, table in store.abstract_state().tables.items()
    }
    state = replace(state, memory=replace(state.memory, tables=tables))
    loaded = on_chips(jax.eval_shape(store.load, state.memory, plan)) if store.layers and reads_ahead(parts) else None
    return Arguments(state, batch, plan, loaded)


def decode_arguments(parts: Parts, given: Arguments) -> DecodeArguments:
    """Arguments of a step of decoding. Call under `jax.set_mesh(parts.mesh)`.

    Raises:
      ConfigError: the mesh or the placement cannot decode.
    """
    check_decodes(parts)
    data, on_chips = parts.config.data, partial(_on_chips, parts)
    weights = on_chips(jax.eval_shape(partial(served, parts), given.state))
    cache = on_chips(jax.eval_shape(partial(new_cache, parts.config.model, data.batch_size, data.seq_len)))
    token_B, is_drawn_B = (
        jax.ShapeDtypeStruct((data.batch_size,), dtype, sharding=NamedSharding(parts.mesh, jax.P(BATCH)))
        for dtype in (jnp.int32, jnp.bool)
    )
    return DecodeArguments(replace(weights, memory=given.state.memory), cache, token_B, is_drawn_B)


def _on_chips(parts: Parts, tree: Any) -> Any:
    def described(x: Any) -> jax.ShapeDtypeStruct:
        dims = x.sharding.spec if x.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(parts.mesh, dims))

    return jax.tree.map(described, tree)


def exchanged_bytes(parts: Parts, given: Arguments | DecodeArguments) -> int:
    """Bytes of the blocks in which rows, or their float32 gradients, cross the mesh: one device, all layers together.

    Blocks have places for all rows that a device may ask for, so a correct program exchanges at most this much.
    """
    store = parts.store
    if isinstance(given, Arguments):
        pairs = [capacity(plan).pair for plan in given.plan.values()]
    else:  # the step itself plans; each device looks up one position of each of its sequences
        sequences = -(-len(given.token_B) // math.prod(parts.mesh.shape[axis] for axis in BATCH))
        rows = sequences * store.config.num_rows_per_token
        pairs = [safe_capacity(layout, rows).pair for layout in store.layouts.values()]
    return store.shards * sum(pairs) * store.config.engram_head_dim * 4


def _rows(parts: Parts, layer: str, plan: MemoryPlan) -> jax.ShapeDtypeStruct:
    """Shape of the rows of a table that this plan reads, at their owners."""
    store = parts.store
    places = store.shards * capacity(plan[layer]).owner
    return jax.ShapeDtypeStruct((places, store.config.engram_head_dim), store.row_dtype)


def lower(program: str, parts: Parts, given: Arguments | DecodeArguments) -> jax.stages.Lowered:
    """The lowered step of a program. Call under `jax.set_mesh(parts.mesh)`."""
    if isinstance(given, DecodeArguments):
        tokens = jax.ShapeDtypeStruct((len(given.token_B), 1), jnp.int32)  # the host sends them without a sharding
        new = (given.token_B, tokens, given.token_B, given.is_drawn_B)
        return next_logits.lower(parts, given.served, given.cache, *new)
    if program == "train":
        step: Any = make_train_step(parts)
        if given.loaded is None:
            return step.lower(given.state, given.batch, given.plan)
        following = given.plan if parts.store.placement.in_program else None
        return step.lower(given.state, given.batch, given.plan, given.loaded, following)
    outside = None if parts.store.placement.in_program else given.loaded
    return make_eval_step(parts).lower(given.state, given.batch, given.plan, outside)  # type: ignore[attr-defined]


# --- compiling ---


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled program."""

    text: str
    """The optimized program as HLO text."""
    sizes: Any
    """The compiler's memory analysis of one device; None if it was stopped before it generated code."""
    seconds: float
    """Time to compile."""
    allocated: int = 0
    """Bytes of one device's HBM in the buffer assignment, arguments and results included. 0: unknown."""
    is_accepted: bool = True
    """False: the program exceeds the chip's memory, and was compiled only to show where."""


class TooLarge(Exception):
    """The compiler refused a program that exceeds the chip's memory."""

    def __init__(self, message: str):
        super().__init__(message.splitlines()[0])
        self.needed = memory_in(message)
        """Bytes of one device; 0 if the message doesn't say."""


def compiled(lowered: jax.stages.Lowered, detail: bool = True, quick: bool = False) -> Compiled:
    """Compiles a lowered program.

    Args:
      detail: compile a program that exceeds the chip's memory a second time, to show where.
      quick: stop after the assignment of buffers. Generating code takes 8 of 9 minutes for engram_27b; it adds the
        compiler's cycles, the size of the code, and the proof that every kernel fits the chip's VMEM. The compiler
        cannot be interrupted: it goes on in a thread, so end the process by `os._exit`.

    Raises:
      TooLarge: the program exceeds the chip's memory, and the compiler refuses it.
    """
    start, is_accepted = time.perf_counter(), True
    run = _assigned if quick else _compile
    try:
        done = run(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "Ran out of memory" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if not detail:
            raise TooLarge(str(error)) from None
        is_accepted = False
        try:
            done = run(lowered, xla_tpu_no_crash_on_oom="true")
        except jax.errors.JaxRuntimeError:
            raise TooLarge(str(error)) from None
    text, sizes, size = done
    return Compiled(text, sizes, time.perf_counter() - start, size, is_accepted)


def _compile(lowered: jax.stages.Lowered, **options: Any) -> tuple[str, Any, int]:
    """Text, memory analysis, and bytes of the buffer assignment, which only the compiler's dump tells."""
    with tempfile.TemporaryDirectory() as folder:
        done = lowered.compile(compiler_options={**_dumped_to(folder), **options})
        return done.as_text() or "", done.memory_analysis(), allocated(Path(folder))


def _assigned(lowered: jax.stages.Lowered, **options: Any) -> tuple[str, None, int]:
    """Text and bytes of the buffer assignment from the dump, as soon as the dump has them."""
    errors: list[Exception] = []
    name = lowered.compiler_ir().operation.attributes["sym_name"].value  # type: ignore[union-attr]

    def go_on(folder: str) -> None:
        try:
            lowered.compile(compiler_options={**_dumped_to(folder), **options})
        except Exception as error:
            errors.append(error)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        compiler = threading.Thread(target=go_on, args=(folder,), daemon=True)
        compiler.start()
        while True:
            is_over = not compiler.is_alive()
            if errors:
                raise errors[0]
            # Helper programs may have such a file too. A complete file ends with the entry computation.
            for file in Path(folder).glob(f"*.{name}.*after_optimizations_after_buffer_assignment.txt"):
                text = file.read_text().rstrip()
                if "\nENTRY " in text and text.endswith("\n}"):
                    return text, None, allocated(Path(folder))
            if is_over:
                raise RuntimeError("the compiler ended without a whole buffer assignment in its dump")
            compiler.join(0.5)


def _dumped_to(folder: str) -> dict[str, Any]:
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def allocated(folder: Path) -> int:
    """Bytes of one device's HBM in the buffer assignment of the largest program in a compiler's dump; 0: no program.

    Allocations in HBM name no memory space (`color`). Thread-local allocations belong to fusions and host computations
    and do not count. (The dump's memory-usage-report counts them: whole tables in the memory of the hosts.)
    """
    programs = [file.read_text() for file in folder.glob("*buffer-assignment.txt")]
    lines = [re.findall(r"^allocation \d+: size (\d+)(.*)$", text, re.MULTILINE) for text in programs]
    return max(
        (sum(int(size) for size, rest in found if not re.search(", (color|thread-local)", rest)) for found in lines),
        default=0,
    )


def memory_in(message: str) -> int:
    """The largest size in a compiler's message, such as 33.00G, in bytes; 0 without a size."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return max((int(float(n) * unit[u]) for n, u in re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", message)), default=0)
