"""Texts in, texts out: continuation as it is drawn, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers.decoders import DecodeStream

from engram_jax.data.tokenizer import Tokenizer
from engram_jax.inference.engine import Engine
from engram_jax.inference.sampling import Sampling


class TextStream:
    """The text of one continuation: whole characters only, and nothing that may be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self._backend, self._stop = tokenizer.backend, tuple(s for s in stop if s)
        # The stream holds back the bytes of an unfinished character.
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Adds a token; True once a stop string stands in the text, of which only what is before it will be shown."""
        self._held += self._stream.step(self._backend, token) or ""
        places = [place for s in self._stop if (place := self._held.find(s)) >= 0]
        if places:
            self._held, self.stopped = self._held[: min(places)], True
        return self.stopped

    def take(self, *, last: bool = False) -> str:
        """What can be shown now; with `last` also what was held back in case a stop string followed."""
        keep = 0 if last or self.stopped else max((_begun(self._held, s) for s in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Piece(NamedTuple):
    """What is new of one continuation."""

    prompt: int
    """Its index."""
    text: str
    """May be empty, while what was drawn may be the beginning of a character or of a stop string."""
    tokens: int
    """1 for a token that was drawn; 0 where only text comes that was held back."""
    ended: bool
    """Whether it is the last one of its prompt."""


def pieces(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Sequence[str] = ()
) -> Iterator[Piece]:
    """Yields the continuations of all prompts as they are drawn.

    A continuation ends at the tokenizer's eos, before a stop string, or where the engine ends it.

    Raises:
      ConfigError: as `Engine.generate`.
    """
    streams = [TextStream(tokenizer, ids, stop) for ids in prompts]
    made = [0] * len(prompts)
    cut: list[int] = []

    def ends(index: int, token: int) -> bool:
        if token == tokenizer.eos_id or streams[index].push(token):
            cut.append(index)  # the token that ends it is none of it
            return True
        return False

    def rest(index: int) -> Piece:
        return Piece(index, streams[index].take(last=True), 0, True)

    for index, _ in engine.stream(prompts, sampling, ends):
        made[index] += 1
        ended = made[index] == sampling.max_tokens or len(prompts[index]) + made[index] == engine.max_len
        yield Piece(index, streams[index].take(last=ended), 1, ended)
        while cut:
            yield rest(cut.pop(0))
    yield from map(rest, cut)


def continued(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Sequence[str] = ()
) -> Iterator[tuple[int, str]]:
    """`pieces` for who wants the text only: yields (index of a prompt, next piece of its text)."""
    for piece in pieces(engine, tokenizer, prompts, sampling, stop):
        yield piece.prompt, piece.text
