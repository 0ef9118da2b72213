"""Where a run's wall time goes: in steps, and by cause in everything else, over all its sessions.

Every line of metrics.jsonl that has a loss also has `goodput/seconds`, the wall time of the run's sessions so far, and
`goodput/<cause>`, the share of it that went to

    steps        training steps, and what the loop does between them
    startup      reading the corpus, building or restoring the state, up to the first step
    compile      XLA, whenever it compiles
    data         waiting for the next batch
    evaluation   held-out loss
    saving       checkpoints, as far as the loop waits for them
    lost         steps that a crash undid, from the last checkpoint to the last line

The time between two sessions is not counted: a run may be stopped for the night.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

CAUSES = ("steps", "startup", "compile", "data", "evaluation", "saving", "lost")
COMPILED = "/jax/core/compile/backend_compile_duration"


class Goodput:
    """A stopwatch with one hand and a dial for each cause. Use as a context manager; it starts with `startup`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._since, self._cause = clock, clock(), "startup"
        self._seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)

    def __enter__(self) -> Goodput:
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def turn_to(self, cause: str) -> str:
        """From now on time goes to `cause`; returns what it went to before."""
        now, before = self._clock(), self._cause
        self._seconds[before] += now - self._since
        self._since, self._cause = now, cause
        return before

    @contextlib.contextmanager
    def on(self, cause: str) -> Iterator[None]:
        before = self.turn_to(cause)
        try:
            yield
        finally:
            self.turn_to(before)

    def resume(self, lines: list[dict[str, Any]], step: int) -> None:
        """Takes over what earlier sessions counted in metrics.jsonl, of which the steps after `step` are to be done
        again."""
        counted = [line for line in lines if "goodput/seconds" in line]
        kept = [line for line in counted if line["step"] <= step]
        if kept:
            for cause in CAUSES:
                self._seconds[cause] += kept[-1][f"goodput/{cause}"] * kept[-1]["goodput/seconds"]
        if counted:
            self._seconds["lost"] += counted[-1]["goodput/seconds"] - (kept[-1]["goodput/seconds"] if kept else 0.0)

    def shares(self) -> dict[str, float]:
        self.turn_to(self._cause)
        total = sum(self._seconds.values())
        shares = {f"goodput/{cause}": seconds / max(total, 1e-9) for cause, seconds in self._seconds.items()}
        return {"goodput/seconds": total, **shares}

    def line(self) -> str:
        """`Wall time: 81 % steps, 12 % compile, 7 % startup.`"""
        shares = {name.removeprefix("goodput/"): share for name, share in self.shares().items()}
        rest = sorted((cause for cause in CAUSES[1:] if shares[cause] >= 0.005), key=lambda cause: -shares[cause])
        return f"Wall time: {', '.join(f'{shares[cause]:.0%} {cause}' for cause in ('steps', *rest))}."

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:  # compiling is always a part of something else
            self._seconds[self._cause] -= duration_secs
            self._seconds["compile"] += duration_secs
