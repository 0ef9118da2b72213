"""Reads the text of a compiled program: computations, instructions, and how often each is run.

XLA prints a loop's body once however often it runs, and a device's own shapes, not the whole mesh's. What counts a
step's work therefore multiplies by `times` (nested loops multiply) and speaks of one device. Knows nothing of models.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from engram_jax.aot.shapes import Shape, shapes


@dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[Shape, ...]
    """Of the result; several if it is a tuple."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_tuple: bool = False

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def scope(self) -> str:
        """Where the program says it comes from: the names of its functions and scopes."""
        return (self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "").replace("\\'", "'")

    @property
    def index(self) -> int:
        """Of get-tuple-element."""
        return int(self.attribute(r"index=(\d+)") or 0)

    @property
    def called(self) -> list[str]:
        """Computations that it runs; not those that are applied to numbers, as in a reduction."""
        opcode = self.opcode.removesuffix("-start")
        wanted = {"while": "body", "conditional": r"\w*computations?", "call": "to_apply"}.get(opcode, "calls")
        found = re.findall(rf"\b(?:{wanted})=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes)
        return [name.strip().lstrip("%") for one, many in found for name in (one or many).split(",") if name.strip()]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.operands[0]): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operand(self, instruction: Instruction, place: int) -> Instruction:
        return self.instructions[instruction.operands[place]]


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: str
    every_branch: bool = False
    """Whether all branches of a conditional count; else the shortest alone, which leaves out what seldom happens."""

    def __post_init__(self):
        self.unknown_loops: list[str] = []
        """Loops whose number of rounds the text doesn't say; they are counted once."""
        self.fused: set[str] = set()
        """Computations inside a fusion: what is between their instructions never reaches memory."""
        self.on_host: set[str] = set()
        self.callers: dict[str, Instruction] = {}
        """Of each computation, the last instruction that runs it."""
        self.times: dict[str, float] = self._count()

    def _count(self) -> dict[str, float]:
        """How often each computation runs. Callees are printed before their callers."""
        times = defaultdict(float, {self.entry: 1.0})
        for computation in reversed(list(self.computations.values())):
            runs = times[computation.name]
            if not runs:
                continue
            for i in computation.instructions.values():
                rounds = 1
                if i.opcode == "while":
                    rounds = trip_count(self, computation, i)
                    if rounds is None:
                        self.unknown_loops.append(i.name)
                        rounds = 1
                for name in self._taken(i):
                    times[name] += runs * rounds
                    self.callers[name] = i
                    if i.opcode == "fusion" or computation.name in self.fused:
                        self.fused.add(name)
                    if '_xla_compute_type="host"' in i.attributes or computation.name in self.on_host:
                        self.on_host.add(name)
        return {name: n for name, n in times.items() if n and name in self.computations}

    def _taken(self, i: Instruction) -> list[str]:
        if i.opcode != "conditional" or self.every_branch:
            return i.called
        return [min(i.called, key=lambda name: len(self.computations[name].instructions))]

    def walk(self) -> Iterator[tuple[Computation, float]]:
        """(computation, times) of everything that runs on the device, in the order of the text."""
        for name, computation in self.computations.items():
            if name in self.times and name not in self.on_host:
                yield computation, self.times[name]


def parse(text: str, every_branch: bool = False) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif current is None:
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = computations[head.group(2)] = Computation(head.group(2))
                entry = head.group(2) if head.group(1) else entry
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                current.root = instruction.name
    if not entry:
        raise ValueError("this text is no HLO module: it has no ENTRY")
    return Module(computations, entry, every_branch)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those joined that a kernel's metadata broke: nothing but an instruction begins with a space."""
    whole, is_inside = "", False
    for line in text.splitlines():
        if is_inside and line[:1] != " " and line != "}" and not line.startswith("}, execution_thread"):
            whole += line
            continue
        yield whole
        whole = line
        is_inside = line.startswith(" ") or (line.endswith("{") and line != "{")
    yield whole


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    start = head.end()
    is_tuple = line[start] == "("
    end = _closing(line, start) + 1 if is_tuple else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    inside = re.sub(r"/\*.*?\*/", "", line[opening + 1 : closing])
    operands = tuple(word.strip().split(" ")[-1].lstrip("%") for word in _split(inside) if word.strip())
    return Instruction(
        head.group(1), shapes(line[start:end]), line[end:opening].strip(), operands, line[closing + 1 :], is_tuple
    )


def _closing(line: str, opening: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {line[:200]!r}")


def _split(inside: str) -> list[str]:
    """At commas outside brackets: operands may come with their types."""
    if not re.search(r"[\[{(]", inside):
        return inside.split(",")
    parts, depth, start = [], 0, 0
    for i, character in enumerate(inside):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(inside[start:i])
            start = i + 1
    return [*parts, inside[start:]]


# --- loops ---


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Rounds of a while loop that counts from a constant to a constant; None if it is not one."""
    known = loop.attribute(r'known_trip_count[^}]*?"?n"?\s*[:=]\s*"?(\d+)')
    if known is not None:
        return int(known)
    condition = module.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "")
    body = module.computations.get(loop.attribute(r"body=%?([\w.\-]+)") or "")
    outside, first = _source(module, [(computation, None)], loop.operands[0])
    if condition is None or body is None or first.opcode != "tuple":
        return None

    def number(frames: Frames, name: str) -> int | None:
        """A constant, or one that the loop carries: by its value before the first round."""
        frames, i = _source(module, frames, name)
        place = _carried(frames, i)
        if place is not None:
            _, i = _source(module, outside, first.operands[place])
        return int(i.operands[0]) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.operands[0]) else None

    frames, compare = _source(module, [(condition, None)], condition.root)
    if compare.opcode != "compare":
        return None
    left, right = compare.operands[:2]
    direction = compare.attribute(r"direction=(\w+)") or ""
    for counted, limit, relation in ((left, right, direction), (right, left, _MIRRORED.get(direction, direction))):
        place = _carried(*_source(module, frames, counted))
        inside, step = _source(module, [(body, None)], body.instructions[body.root].operands[place or 0])
        if place is None or step.opcode not in ("add", "subtract"):
            continue
        others = [name for name in step.operands if _carried(*_source(module, inside, name)) != place]
        stride = number(inside, others[0]) if len(others) == 1 else None
        start, end = number(outside, first.operands[place]), number(frames, limit)
        if stride and start is not None and end is not None and relation in _REACHED:
            stride = stride if step.opcode == "add" else -stride
            return max(0, math.ceil((end - start + _REACHED[relation]) / stride))
    return None


Frames = list[tuple[Computation, Instruction | None]]
"""Computations one within the other, each with the fusion that runs it."""
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
_REACHED = {"LT": 0, "GT": 0, "NE": 0, "LE": 1, "GE": -1}
"""What the limit itself adds to the span that is counted through."""
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier", "broadcast", "transpose")


def _source(module: Module, frames: Frames, name: str) -> tuple[Frames, Instruction]:
    """The instruction that computes `name`, seen through copies and into and out of fusions."""
    while True:
        computation, caller = frames[-1]
        i = computation.instructions[name]
        if i.opcode in _SAME and i.operands:
            name = i.operands[0]
        elif i.opcode == "fusion":
            inner = module.computations[i.called[0]]
            frames, name = [*frames, (inner, i)], inner.root
        elif i.opcode == "parameter" and caller is not None:
            frames, name = frames[:-1], caller.operands[int(i.operands[0])]
        elif i.opcode == "get-tuple-element":
            within, source = _source(module, frames, i.operands[0])
            if source.opcode != "tuple":
                return frames, i
            frames, name = within, source.operands[i.index]
        else:
            return frames, i


def _carried(frames: Frames, i: Instruction) -> int | None:
    """The place in the loop's tuple, if that is where it comes from."""
    is_element = i.opcode == "get-tuple-element"
    return i.index if is_element and frames[-1][0].instructions[i.operands[0]].opcode == "parameter" else None
