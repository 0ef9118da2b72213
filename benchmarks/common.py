"""What every benchmark prints and how it times. Compare ratios within one run: absolute times are the machine's."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np


def header() -> None:
    """Prints what the numbers below depend on: command, versions, machine."""
    devices = jax.devices()
    print(f"command   {shlex.join(['python', *sys.orig_argv[1:]])}")
    print(f"versions  Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in ("jax", "numpy")))
    print(f"machine   {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    print(f"devices   {len(devices)} x {devices[0].device_kind} ({devices[0].platform})")


def time_median(fn: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of `repeats` calls after one that warms up; waits for jax arrays in the result."""
    jax.block_until_ready(fn())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
