"""A few steps under the profiler, and what they say on one page: RUN_DIR/profile/summary.md beside the trace itself.

The trace opens in XProf or Perfetto. The summary needs neither: step time, how busy the devices are, the share of
collectives, and the self time of operations and of the scopes they were traced in. Scopes are not in the events but in
the programs that the trace carries (HloProto), of which a few fields are read from the wire format.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from engram_jax.distributed import is_first

WARM_UP, STEPS = 5, 5
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "ragged-all-to-all")
LINES = 15


class Profile:
    """Watches a training loop from step `WARM_UP` on, for `STEPS` steps. On process 0 only."""

    def __init__(self, folder: Path):
        self._folder, self._wanted, self._first = folder, is_first(), -1
        self._started = 0.0

    def before_step(self, done: int, state: Any) -> None:
        """`done` steps were dispatched in this session."""
        if not self._wanted:
            return
        if self._first < 0 and done >= WARM_UP:
            shutil.rmtree(self._folder, ignore_errors=True)
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._first, self._started = done, time.perf_counter()
        elif self._first >= 0 and done >= self._first + STEPS:
            self._stop(done, state)

    def close(self, done: int, state: Any, log: Callable[[str], None]) -> None:
        """Ends the trace if the loop ended before it."""
        if self._wanted and self._first >= 0:
            self._stop(done, state)
        if is_first():
            page = self._folder / "summary.md"
            log(f"Profile: {page}." if page.exists() else f"Profile: none, of the first {WARM_UP} steps is no use.")

    def _stop(self, done: int, state: Any) -> None:
        jax.block_until_ready(state)
        seconds, steps = time.perf_counter() - self._started, done - self._first
        jax.profiler.stop_trace()
        self._wanted = False
        (trace,) = self._folder.rglob("*.xplane.pb")
        (self._folder / "summary.md").write_text(summary(trace, steps, seconds))


@dataclass(frozen=True)
class Op:
    device: str
    module: str
    name: str
    start: float
    """Nanoseconds, as all times here."""
    end: float
    self_time: float
    """Without the operations inside it, as those of a loop's body."""
    scope: str


def summary(trace: Path, steps: int, seconds: float) -> str:
    """The page, from a trace of `steps` steps that took `seconds`."""
    ops = read_ops(trace)
    devices = {op.device for op in ops}
    busy = sum(_union([(op.start, op.end) for op in ops if op.device == device]) for device in devices)
    total = sum(op.self_time for op in ops)
    collective = sum(op.self_time for op in ops if op.name.startswith(COLLECTIVES))
    by_op: dict[str, float] = defaultdict(float)
    by_scope: dict[str, float] = defaultdict(float)
    for op in ops:
        by_op[f"{op.module}: {op.name}"] += op.self_time
        by_scope[op.scope] += op.self_time
    whole = max(len(devices), 1) * seconds * 1e9
    return "\n".join(
        [
            "# Profile",
            "",
            f"{steps} steps, {seconds / steps * 1e3:,.1f} ms each with all that fell between them, "
            f"on the {len(devices)} devices of process 0.",
            "",
            "| | share |",
            "|---|---|",
            f"| devices computing, of wall time | {busy / whole:.1%} |",
            f"| devices idle | {1 - busy / whole:.1%} |",
            f"| collectives, of operation time | {collective / max(total, 1):.1%} |",
            "",
            *_table("scope", by_scope, total, steps * max(len(devices), 1)),
            "",
            *_table("operation", by_op, total, steps * max(len(devices), 1)),
            "",
        ]
    )


def _table(what: str, times: dict[str, float], total: float, shares: int) -> Iterator[str]:
    yield f"| {what} | share | ms per step and device |"
    yield "|---|---|---|"
    for name, nanoseconds in sorted(times.items(), key=lambda item: -item[1])[:LINES]:
        yield f"| `{name}` | {nanoseconds / max(total, 1):.1%} | {nanoseconds / shares / 1e6:.3f} |"


def read_ops(trace: Path) -> list[Op]:
    """The operations that ran on the devices, of all programs."""
    serialized = trace.read_bytes()
    scopes = scopes_of(serialized)
    ops: list[Op] = []
    for plane in ProfileData.from_serialized_xspace(serialized).planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_device and line.name != "XLA Ops":
                continue  # steps, modules and scopes: the same time again
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if not (on_device or "hlo_op" in stats):
                    continue
                name = re.sub(r"^%?([\w.-]+).*", r"\1", str(stats.get("hlo_op") or event.name), flags=re.DOTALL)
                module = re.sub(r"\(\d+\)$", "", str(stats.get("hlo_module", "")))
                scope = str(stats.get("tf_op") or scopes.get((module, name), ""))
                device = plane.name if on_device else f"cpu:{stats.get('device_ordinal', 0)}"
                events.append((event.start_ns, event.start_ns + event.duration_ns, device, module, name, scope))
            ops += _with_self_times(events)
    return ops


def _with_self_times(events: list[tuple[float, float, str, str, str, str]]) -> list[Op]:
    """One line's events, in which those that lie inside another are taken from its time."""
    events.sort(key=lambda event: (event[0], -event[1]))
    inner, open_ = [0.0] * len(events), []
    for i, (start, end, *_) in enumerate(events):
        while open_ and events[open_[-1]][1] <= start:
            open_.pop()
        if open_:
            inner[open_[-1]] += end - start
        open_.append(i)
    return [
        Op(device, module, name, start, end, max(end - start - inside, 0.0), _short(scope))
        for (start, end, device, module, name, scope), inside in zip(events, inner, strict=True)
    ]


GENERIC = {"while", "body", "cond", "closed_call", "checkpoint", "remat", "scan", "shard_map", "rematted_computation"}


def _short(scope: str) -> str:
    """`jit(train_step)/transpose(jvp(engram))/while/body/dot_general` -> `train_step/engram`: what somebody named."""
    names = []
    for word in scope.split("/")[:-1]:
        while inside := re.fullmatch(r"\w+\((.*)\)", word):
            word = inside[1]
        # Within a program, names that begin with _ are functions of jax, and einsums are called by their equation.
        if word not in GENERIC and re.fullmatch(r"\w+" if not names else r"(?!_|branch_\d)\w+", word):
            names.append(word)
    return "/".join(names[:3]) or "(no scope)"


def _union(intervals: list[tuple[float, float]]) -> float:
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


# --- the programs in the trace: XSpace -> XPlane -> XEventMetadata -> XStat -> HloProto ---


def scopes_of(xspace: bytes) -> dict[tuple[str, str], str]:
    """(module, instruction) -> the scopes it was traced in, as in jit(step)/engram/dot_general."""
    scopes = {}
    for plane in _fields(xspace, 1):
        if next(_fields(plane, 2), b"") != b"/host:metadata":
            continue
        for entry in _fields(plane, 4):
            for metadata in _fields(entry, 2):
                for stat in _fields(metadata, 5):
                    for proto in _fields(stat, 6):
                        for module in _fields(proto, 1):
                            scopes |= _scopes_of_module(module)
    return scopes


def _scopes_of_module(module: bytes) -> dict[tuple[str, str], str]:
    name, scopes = next(_fields(module, 1), b"").decode(), {}
    for computation in _fields(module, 3):
        for instruction in _fields(computation, 2):
            for metadata in _fields(instruction, 7):
                for op_name in _fields(metadata, 2):
                    scopes[name, next(_fields(instruction, 1)).decode()] = op_name.decode()
    return scopes


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The length-delimited fields of this number in a protocol buffer."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(message, at)
            if key >> 3 == number:
                yield message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
