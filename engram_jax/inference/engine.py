"""Many prompts on one model: prefill in chunks, decode together, and a new prompt wherever a sequence has ended.

Each step gives every place of the batch its next tokens: up to `chunk` of a prompt that is still being read, or the
token drawn last. So prompts of any length share a batch, and a long one holds nobody up (chunked prefill, as serving
engines do it). Drawn tokens stay on the device for the next step, which starts before the host has seen them: that a
sequence has ended is noticed one step later, and what that step drew for it is dropped.

What a place holds is kept: a prompt that goes on from it, or from at most `spare` tokens before its end, reads only
what is new.

Letters: B batch (places), T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ConfigError, require
from engram_jax.inference.cache import Cache, new_cache, reset, rollback
from engram_jax.inference.decode import extend
from engram_jax.inference.sampling import Sampling, choose
from engram_jax.inference.served import Served, served
from engram_jax.memory.placements import in_program_placements
from engram_jax.runs.parts import Parts
from engram_jax.runs.state import TrainState
from engram_jax.sharding import BATCH, placed

UNKNOWN = -1
"""A token that was drawn and fed, and that the host has not seen yet."""


@dataclass
class _Place:
    """One sequence of the batch, as the host knows it."""

    held: list[int] = field(default_factory=list)
    """The tokens in the cache."""
    unread: list[int] = field(default_factory=list)
    """What is left of the prompt."""
    request: int | None = None
    """Index of the prompt that is being continued here."""
    made: int = 0
    """Tokens drawn for it."""
    floor: int = 0
    """Length before which nothing can be restored: `spare` less than the most that was ever held since a reset."""


class _Step(NamedTuple):
    tokens_B: jax.Array
    drawn: list[tuple[int, _Place, int]]
    """(b, place, prompt) of each drawn token that means something."""


class Engine:
    """`engine.generate(prompts, sampling)`. Two programs compile at their first use: one for chunks, one to decode.

    What a prompt becomes depends on the prompt, its index and the sampling, not on what else is in the batch.
    """

    def __init__(
        self,
        parts: Parts,
        state: TrainState,
        batch_size: int = 8,
        max_len: int = 1024,
        chunk: int = 128,
        spare: int = 16,
    ):
        """
        Args:
          batch_size: sequences that are computed together.
          max_len: tokens of a prompt with its continuation.
          chunk: tokens of a prompt that are read in one step.
          spare: tokens by which the end of a held sequence may be taken back to start another, all times together.

        Raises:
          ConfigError: the batch or the mesh does not fit.
        """
        for name, value in (("batch_size", batch_size), ("max_len", max_len), ("chunk", chunk)):
            require(value > 0, f"{name}={value} must be positive.")
        require(spare >= 0, f"spare={spare} must not be negative.")
        shards = int(np.prod([parts.mesh.shape[axis] for axis in BATCH]))
        require(
            batch_size % shards == 0,
            f"batch_size={batch_size} is not a multiple of the {shards} devices on the mesh axes {', '.join(BATCH)}.",
        )
        check_decodes(parts)
        self.parts, self.max_len, self.chunk, self.spare = parts, max_len, min(chunk, max_len), spare
        with jax.set_mesh(parts.mesh):
            self._served = served(parts, state)
            # Behind the last token there is room for the padding of a chunk.
            make_cache = partial(new_cache, parts.config.model, batch_size, max_len + self.chunk, spare)
            self._cache = jax.jit(make_cache)()
            self._last_B = placed(jnp.zeros(batch_size, jnp.int32), "batch")
        self._places = [_Place() for _ in range(batch_size)]
        self._turn = object()

    def error(self, prompt: Sequence[int]) -> str | None:
        """What is wrong with a prompt; None if it can be continued."""
        vocab_size, length = self.parts.config.model.vocab_size, len(prompt)
        if length == 0:
            return "the prompt is empty: begin it with the tokenizer's bos."
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            return f"the prompt holds ids outside 0..{vocab_size - 1}: use the tokenizer the model was trained with."
        if length >= self.max_len:
            return f"the prompt has {length} tokens, and max_len={self.max_len} leaves no room for more."
        return None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_id: int | None = None
    ) -> list[list[int]]:
        """The new ids of each prompt, at most `sampling.max_tokens`, at most to `max_len`, and before an `eos_id`.

        Raises:
          ConfigError: a prompt is empty, too long, or holds an id outside the vocabulary (see `error`).
        """
        made: list[list[int]] = [[] for _ in prompts]
        for index, token in self.stream(prompts, sampling, lambda index, token: token == eos_id):
            made[index].append(token)
        return made

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, ends: Callable[[int, int], bool] | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yields (index of a prompt, its next id) as they are drawn; `ends(index, id)`: stop that one before the id.

        One at a time: a new stream takes all places of the batch.

        Raises:
          ConfigError: as `generate`.
          RuntimeError: this stream is asked for more after another one of this engine has begun.
        """
        for prompt in prompts:
            if (error := self.error(prompt)) is not None:
                raise ConfigError(error)
        turn = self._turn = object()
        for place in self._places:  # an iterator before this one may have been left unfinished
            place.request, place.unread = None, []
        waiting, ended, before = deque(range(len(prompts))), set(), None
        while True:
            self._seat(waiting, prompts)
            busy = any(place.request is not None for place in self._places)
            step = self._start(sampling) if busy else None
            if before is not None:
                tokens_B = np.asarray(before.tokens_B)
                for b, place, index in before.drawn:
                    if index in ended:
                        continue
                    token = int(tokens_B[b])
                    if place.held[-1] == UNKNOWN:  # what this step feeds
                        place.held[-1] = token
                    if ends is not None and ends(index, token):
                        ended.add(index)
                        place.request = None
                    else:
                        yield index, token
                        if self._turn is not turn:
                            raise RuntimeError(
                                "Another stream of this engine has begun, which ended this one: an engine serves one "
                                "at a time. Give all prompts to one stream, or use two engines."
                            )
            if step is None and not waiting:
                return
            before = step

    def _seat(self, waiting: deque[int], prompts: Sequence[Sequence[int]]) -> None:
        """Gives free places to waiting prompts, each the one that holds most of it."""
        free = [b for b, place in enumerate(self._places) if place.request is None]
        back_B = np.zeros(len(self._places), np.int32)
        anew_B = np.zeros(len(self._places), bool)
        while waiting and free:
            index = waiting.popleft()
            prompt = list(prompts[index])
            reusable = {b: _reusable(self._places[b], prompt) for b in free}
            b = max(free, key=lambda b: (reusable[b], -len(self._places[b].held)))
            free.remove(b)
            kept = reusable[b]
            back_B[b], anew_B[b] = len(self._places[b].held) - kept, kept == 0
            self._places[b] = _Place(prompt[:kept], prompt[kept:], index, floor=self._places[b].floor if kept else 0)
        if anew_B.any():
            self._cache = self._run(_reset, self._cache, anew_B)
        if (back_B := np.where(anew_B, 0, back_B)).any():
            self._cache = self._run(_rollback, self._cache, back_B)

    def _start(self, sampling: Sampling) -> _Step:
        """Starts one step of all places."""
        places = self._places
        width = self.chunk if any(len(place.unread) > 1 for place in places) else 1
        tokens_BT = np.zeros((len(places), width), np.int32)
        count_B, index_B = np.zeros(len(places), np.int32), np.zeros(len(places), np.int32)
        feeds_drawn_B, drawn = np.zeros(len(places), bool), []
        for b, place in enumerate(places):
            if place.request is None:
                continue
            new, place.unread = place.unread[:width], place.unread[width:]
            tokens_BT[b, : len(new)], feeds_drawn_B[b] = new, not new
            count_B[b], index_B[b] = max(len(new), 1), place.request
            place.held += new or [UNKNOWN]
            place.floor = max(place.floor, len(place.held) - self.spare)
            if not place.unread:
                drawn.append((b, place, place.request))
                place.made += 1
                if place.made == sampling.max_tokens or len(place.held) + 1 == self.max_len:
                    place.request = None  # this step draws its last token
        logits_BV, self._cache = self._run(
            next_logits, self.parts, self._served, self._cache, self._last_B, tokens_BT, count_B, feeds_drawn_B
        )
        cut = (sampling.temperature, sampling.top_k, sampling.top_p)
        seed = np.uint32(sampling.seed)
        self._last_B = self._run(_draw, logits_BV, seed, index_B, self._cache.length_B, *cut)
        return _Step(self._last_B, drawn)

    def _run(self, program: Callable, *arguments: Any) -> Any:
        # Around each step, not around the loop: a suspended generator must not leave its mesh with the caller.
        with jax.set_mesh(self.parts.mesh):
            return program(*arguments)


def _reusable(place: _Place, prompt: list[int]) -> int:
    """Tokens of a prompt that need not be read in this place; its last one must be, for its logits."""
    common = 0
    for a, b in zip(place.held, prompt[:-1], strict=False):
        if a != b:
            break
        common += 1
    return common if common >= place.floor else 0


def check_decodes(parts: Parts) -> None:
    """Raises `ConfigError` if the parts cannot be decoded with."""
    context, placement = parts.mesh.shape["context"], parts.config.memory.placement
    require(
        context == 1,
        f"mesh_context={context}: a sequence that is decoded is not cut over devices. Give these to mesh_tensor or "
        "mesh_fsdp.",
    )
    require(
        parts.store.placement.in_program,
        f"memory.placement={placement}: decoding reads its rows within its program, which cannot reach these tables. "
        f"Choose one of {', '.join(in_program_placements())}.",
    )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def next_logits(
    parts: Parts,
    served: Served,
    cache: Cache,
    last_B: jax.Array,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    feeds_drawn_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """float32 logits [B, V] after each sequence's last new token, and the cache."""
    tokens_BT, feeds_drawn_B = placed(tokens_BT, "batch", None), placed(feeds_drawn_B, "batch")
    first_B = jnp.where(feeds_drawn_B, last_B, tokens_BT[:, 0])
    tokens_BT = jnp.concatenate([first_B[:, None], tokens_BT[:, 1:]], axis=1)
    model = parts.model(served.params, served.buffers)
    hidden_BTD, cache = extend(model, parts.store, served.memory, served.step, tokens_BT, count_B, cache)
    last_B1 = placed(jnp.maximum(count_B - 1, 0), "batch")[:, None, None]
    last_B1D = jnp.take_along_axis(placed(hidden_BTD, "batch", None, "act"), last_B1, axis=1)
    return placed(model.logits(placed(last_B1D, "batch", "seq", "act")), "batch", None, None)[:, 0], cache


@partial(jax.jit, static_argnums=(4, 5, 6))
def _draw(
    logits_BV: jax.Array,
    seed: jax.Array,
    index_B: jax.Array,
    length_B: jax.Array,
    temperature: float,
    top_k: int,
    top_p: float,
) -> jax.Array:
    """The next id of each sequence. Another temperature compiles this program only, not the model."""

    def key(index: jax.Array, length: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), length)

    # Few numbers, and sorting them knows no sharded dims.
    logits_BV, index_B, length_B = (placed(x, *[None] * x.ndim) for x in (logits_BV, index_B, length_B))
    return placed(choose(logits_BV, jax.vmap(key)(index_B, length_B), temperature, top_k, top_p), "batch")


@partial(jax.jit, donate_argnums=0)
def _reset(cache: Cache, ends_B: jax.Array) -> Cache:
    return reset(cache, placed(ends_B, "batch"))


@partial(jax.jit, donate_argnums=0)
def _rollback(cache: Cache, count_B: jax.Array) -> Cache:
    return rollback(cache, placed(count_B, "batch"))
