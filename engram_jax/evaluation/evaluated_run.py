"""A trained run that is measured: token sequences in, losses and continuations out.

Sequences of any length are padded on the right to the next power of two, where a causal model does not look. They are
batched by that length, with one compilation for each length.

Legend: B batch, T seq, D hidden size, V vocabulary, C positions whose logits exist at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import require
from engram_jax.data.tokenizer import Tokenizer, load_tokenizer
from engram_jax.evaluation.knock_out import parse_scales, scale_memory
from engram_jax.inference.sampling import Sampling
from engram_jax.layers.cross_entropy import NO_LOSS
from engram_jax.runs.load import load_run
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState
from engram_jax.sharding import BATCH, placed

SHORTEST = 64
LARGEST_BATCH = 32
"""Sequences decoded together, at most."""
LOGITS_BYTES = 256 << 20
"""Most bytes of logits in memory at a time; one position of a batch is always computed."""


class Scored(NamedTuple):
    """Scores of a sequence of T ids: one entry for each id but the first, given all ids before it."""

    losses: np.ndarray
    """float32 [T - 1], nats."""
    is_greedy: np.ndarray
    """bool [T - 1], whether the id was the most probable one."""


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """A trained run ready to be measured: losses of token sequences, and continuations of prompts.

        run = EvaluatedRun.load(Path("runs/engram_tiny"))
        scored = run.score([[run.tokenizer.bos_id, *run.tokenizer.encode("some text")]])
        scored[0].losses                   float32 [T - 1], nats

    Sequences may have any length; those of equal padded length are computed together.
    """

    name: str
    """Name of the run's folder."""
    parts: Parts
    """The static half of the run: config, mesh, store, model structure."""
    state: TrainState
    """The arrays: parameters and tables."""
    tokenizer: Tokenizer
    """The tokenizer that the run was trained with."""
    run_dir: Path
    """The run's folder."""
    batch_tokens: int = 4096
    """Tokens computed at a time, about: sets the batch size at each length."""
    memory_scale: Mapping[int, float] = field(default_factory=dict)
    """Factor on the rows of each Engram layer. `state` has it already; it is kept for the record."""
    log: Callable[[str], None] = print
    """Where warnings go."""
    _said: set[str] = field(default_factory=set)
    _engines: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        run_dir: Path | str,
        batch_tokens: int = 4096,
        memory_scale: Sequence[str] = (),
        log: Callable[[str], None] = print,
        mesh: Mapping[str, int] | None = None,
        placement: str = "",
    ) -> EvaluatedRun:
        """Loads a run's newest checkpoint.

        Args:
          memory_scale: factors on the rows: `["0"]` for all layers, `["1=0", "2=0.5"]` for some.
          mesh: devices on the mesh axes, `{"tensor": 4}`. None: one device.
          placement: the memory that holds the tables. Empty: as in training.

        Raises:
          RunError: the folder is not a run, has no checkpoint, or has a tokenizer that is not the run's.
          ConfigError: memory_scale names no layer or no number, or the mesh does not fit.
        """
        run_dir = Path(run_dir)
        state, parts = load_run(run_dir, log, mesh=mesh, placement=placement)
        tokenizer = load_tokenizer(run_dir / "tokenizer.json")
        scales = parse_scales(memory_scale, parts.config.model.engram)
        with jax.set_mesh(parts.mesh):
            state = scale_memory(state, scales)
        return cls(run_dir.resolve().name, parts, state, tokenizer, run_dir, batch_tokens, scales, log)

    @property
    def context(self) -> int:
        """Tokens of context that the model was trained with."""
        return self.parts.config.data.seq_len

    @property
    def step(self) -> int:
        return int(jax.device_get(self.state.step))

    @property
    def corpus_sha256(self) -> str:
        """Hash of the text that the run was trained on, from its result.json; empty before the run is finished."""
        try:
            return json.loads((self.run_dir / "result.json").read_text())["corpus_sha256"]
        except (OSError, ValueError, KeyError):
            return ""

    def score(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[Scored]:
        """Losses of every id but the first of each sequence, given the ids before it; in the order of the sequences.

        A sequence is a document's ids with its bos, or a window of it. Nothing is added or cut off.

        Raises:
          ConfigError: a sequence is empty or holds an id outside the vocabulary.
        """
        for sequence in sequences:
            self._check(sequence)
        scored: list[Scored | None] = [None] * len(sequences)
        by_length: dict[int, list[int]] = {}
        for index, sequence in enumerate(sequences):
            by_length.setdefault(padded_length(len(sequence) - 1), []).append(index)
        for length, indices in sorted(by_length.items(), reverse=True):  # the largest first: what fails, fails early
            batch_size = self._batch_size(self.batch_tokens // length)
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                losses_BT, is_greedy_BT = self._score_batch([sequences[i] for i in chosen], batch_size, length)
                for row, index in enumerate(chosen):
                    count = len(sequences[index]) - 1
                    scored[index] = Scored(losses_BT[row, :count], is_greedy_BT[row, :count])
        return [result for result in scored if result is not None]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        ends: Callable[[int, int], bool] = lambda index, token: False,
    ) -> list[list[int]]:
        """New ids for each prompt, up to `sampling.max_tokens` or before the first eos.

        Args:
          prompts: ids that begin with bos.
          ends: called with a prompt's index and each new id but eos, in order; True ends that prompt before the id.

        Raises:
          ConfigError: a prompt is empty or holds an id outside the vocabulary.
        """
        from engram_jax.inference.engine import Engine

        for prompt in prompts:
            self._check(prompt)
        longest = max(map(len, prompts), default=1) + sampling.max_tokens
        length = padded_length(longest)
        if length not in self._engines:
            self._engines.clear()  # one cache in memory at a time
            batch_size = self._batch_size(min(LARGEST_BATCH, self.batch_tokens // length))
            self._engines[length] = Engine(self.parts, self.state, batch_size, length)
        eos_id, made = self.tokenizer.eos_id, [[] for _ in prompts]

        def is_over(index: int, token: int) -> bool:
            return token == eos_id or ends(index, token)

        for index, token in self._engines[length].stream(prompts, sampling, is_over):
            made[index].append(token)
        return made

    def greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """`generate` with the most probable id each time."""
        return self.generate(prompts, Sampling(max_tokens=max_tokens, temperature=0))

    def _batch_size(self, wanted: int) -> int:
        """At most `wanted`, in multiples of the devices that share the sequences."""
        shards = math.prod(self.parts.mesh.shape[axis] for axis in BATCH)
        return max(1, wanted // shards) * shards

    def warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self.log(f"warning: {message}")

    def warn_if_longer(self, length: int, what: str) -> None:
        """Warns once if `what` is longer (`length` tokens) than the sequences of training."""
        if length > self.context:
            yarn = self.parts.config.model.attention.yarn
            reach = f" Its rotations are stretched (YaRN) for {yarn.max_position_embeddings:,}." if yarn.enabled else ""
            self.warn_once(
                f"{what} has {length:,} tokens of context, and {self.name} was trained with data.seq_len="
                f"{self.context:,}: positions beyond were never seen in training.{reach}"
            )

    def _check(self, sequence: Sequence[int] | np.ndarray) -> None:
        vocab_size = self.parts.config.model.vocab_size
        require(len(sequence) > 0, "a sequence is empty: it must begin with the tokenizer's bos.")
        low, high = int(np.min(sequence)), int(np.max(sequence))
        require(
            low >= 0 and high < vocab_size,
            f"id {low if low < 0 else high} is outside the vocabulary of {self.name}, 0..{vocab_size - 1}: use the "
            "tokenizer the model was trained with.",
        )

    def _score_batch(self, sequences: list, batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.zeros((batch_size, length + 1), np.int32)
        is_id = np.zeros((batch_size, length + 1), bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            is_id[row, : len(sequence)] = True
        targets = np.where(is_id[:, 1:], ids[:, 1:], np.int32(NO_LOSS))
        with jax.set_mesh(self.parts.mesh):
            arrays = ids[:, :-1], is_id[:, :-1].astype(np.int32)
            hidden_BTD = _hidden(self.parts, self.state, *(placed(jnp.asarray(x), "batch", "seq") for x in arrays))
            targets = placed(jnp.asarray(targets), "batch", None)
            chunk = chunk_length(batch_size, length, self.parts.config.model.vocab_size)
            outputs = [
                _score(self.parts, chunk, self.state, hidden_BTD, targets, start) for start in range(0, length, chunk)
            ]
            losses, is_greedy = zip(*jax.device_get(outputs), strict=True)
        return np.concatenate(losses, axis=1), np.concatenate(is_greedy, axis=1)


def padded_length(length: int) -> int:
    """The next power of two, `SHORTEST` at least."""
    return max(SHORTEST, 1 << (length - 1).bit_length()) if length > 0 else SHORTEST


def chunk_length(batch_size: int, length: int, vocab_size: int) -> int:
    """Positions, a power of two, whose float32 logits take at most `LOGITS_BYTES`."""
    most = max(1, LOGITS_BYTES // (4 * batch_size * vocab_size))
    return min(length, 1 << int(math.log2(most)))


@partial(jax.jit, static_argnums=0)
def _hidden(parts: Parts, state: TrainState, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    plan = parts.store.plan(tokens_BT, segment_ids_BT)
    rows = parts.store.fetch(state.memory, plan, state.step)
    model = parts.model(state.params, state.buffers)
    return placed(model.hidden(tokens_BT, rows, segment_ids_BT)[0], "batch", None, None)


@partial(jax.jit, static_argnums=(0, 1))
def _score(parts: Parts, chunk: int, state: TrainState, hidden_BTD, targets_BT, start) -> tuple[jax.Array, jax.Array]:
    """float32 losses and whether the target is the most probable id, of `chunk` positions from `start`: [B, C] each."""
    hidden_BCD, targets_BC = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (hidden_BTD, targets_BT))
    targets_BC = placed(targets_BC, "batch", "seq")
    logits_BCV = parts.model(state.params, state.buffers).logits(hidden_BCD).astype(jnp.float32)
    is_target_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])[None, None]
    target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
    losses_BC = jnp.where(targets_BC == NO_LOSS, 0, jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC)
    is_greedy_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
    return placed(losses_BC, None, None), placed(is_greedy_BC, None, None)
