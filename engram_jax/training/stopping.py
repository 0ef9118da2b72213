"""Ctrl-C and SIGTERM: the run stops after the same step on every process, wherever the signal arrived."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.errors import INTERRUPTED, TERMINATED

STATUS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}


class StopRequest:
    """The signals heard, by exit status. Use as a context manager. A second Ctrl-C stops at once.

    Among several processes they are compared on the devices, without waiting for them: a loop calls `ask` before it
    starts a step and `answer` once the step before that one is done, when the answer is there.
    """

    def __init__(self, mesh: Mesh):
        self._heard = 0
        """Exit status; 0 for none."""
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._devices = mesh.size

    def ask(self) -> jax.Array | int:
        """Starts to ask all processes."""
        if jax.process_count() == 1:
            return 0
        mine = np.full((1,), self._heard, np.int32)
        return self._largest(jax.make_array_from_callback((self._devices,), self._sharding, lambda _: mine))

    def answer(self, asked: jax.Array | int) -> int:
        """The exit status to stop with, 0 to go on: the same on all processes."""
        return int(jax.device_get(asked)) if jax.process_count() > 1 else self._heard

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in STATUS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self._heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._heard = self._heard or STATUS[signal.Signals(number)]
