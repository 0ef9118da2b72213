"""Who may import whom: the rooms of the house in one order, no circles, and commands that start without jax."""

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOMS = """
engram_jax.version
engram_jax.errors            what a user did wrong, what went wrong, exit statuses
engram_jax.registries        the names of variants
engram_jax.config            settings and their checks
engram_jax.files             small helpers: files, Markdown, pictures, how arrays are cut and travel
engram_jax.markdown
engram_jax.pictures
engram_jax.transports
engram_jax.sharding
engram_jax.memory            n-gram tables: hashed, read, updated, stored
engram_jax.variants          what a setting that names a variant means
engram_jax.layers            attention, experts, residual streams, the reader of the memory
engram_jax.optimizers
engram_jax.data              corpora, tokenizers, batches
engram_jax.model             all layers as one language model
engram_jax.counts            parameters and FLOPs of a model
engram_jax.plugin            a memory for another model
engram_jax.distributed       several processes as one run
engram_jax.runs              a run: its parts, state, folder, checkpoints
engram_jax.training
engram_jax.inference
engram_jax.evaluation
engram_jax.analysis
engram_jax.interop           files of other projects
engram_jax.aot               what a run needs of chips that are not there
engram_jax.comparison        finished runs side by side
engram_jax                   the public names
engram_jax.commands          the command line
engram_jax.__main__

tpu                          TPU VMs in the cloud: created, watched, deleted

experiments.runs             declared runs: what is trained
experiments.pods             declared runs on TPU slices
experiments.studies.engine   how a study asks, is executed and reports
experiments.studies.trained
experiments.studies.analyses
experiments.studies          the studies by name
experiments.run              the commands of a clone
experiments.study
experiments.plan
experiments.compile
experiments
"""
"""From the ground up. A module imports from its own room and from those above it in this list, in functions too."""

STARTS_WITHOUT_JAX = ("engram_jax", "engram_jax.config", "engram_jax.registries", "engram_jax.commands.main", "tpu")
"""Importing these, and all that they import at once, loads none of SLOW: `--help` and a wrong setting take no time."""
SLOW = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "matplotlib", "scipy", "tensorflow_datasets", "tokenizers"}


class Import(NamedTuple):
    module: str
    imported: str
    at_once: bool
    """As the module is imported; otherwise in a function, or for type checkers only."""


class _Imports(ast.NodeVisitor):
    def __init__(self, module: str, modules: Iterable[str]):
        self.module, self.modules, self.found, self.at_once = module, modules, [], True

    def later(self, node):
        before, self.at_once = self.at_once, False
        self.generic_visit(node)
        self.at_once = before

    visit_FunctionDef = visit_AsyncFunctionDef = later

    def visit_If(self, node):
        (self.later if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit)(node)

    def add(self, imported: str):
        self.found.append(Import(self.module, imported, self.at_once))

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node):
        assert not node.level, f"{self.module}, line {node.lineno}: imports are absolute here"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            self.add(inner if inner in self.modules else node.module)


def imports_of(sources: dict[str, str]) -> list[Import]:
    """All imports of these modules, given as {name: source}."""
    found = []
    for module, source in sources.items():
        visitor = _Imports(module, sources)
        visitor.visit(ast.parse(source))
        found += visitor.found
    return found


def room_of(module: str, rooms: list[str]) -> str:
    """A room is a module or a package with all inside it; a package that holds rooms is only its own __init__."""
    for room in rooms:
        if module == room or (module.startswith(f"{room}.") and not any(r.startswith(f"{room}.") for r in rooms)):
            return room
    raise AssertionError(f"{module} is in none of ROOMS (tests/test_layering.py): add its room where it belongs")


def upward(sources: dict[str, str], rooms: list[str]) -> list[str]:
    """Imports of a room further down the list."""
    height = {module: rooms.index(room_of(module, rooms)) for module in sources}
    return [
        f"{module} imports {imported}"
        for module, imported, _ in imports_of(sources)
        if imported in sources and height[imported] > height[module]
    ]


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a ring, the first found; empty if there are none."""
    below = {module: set() for module in sources}
    for module, imported, _ in imports_of(sources):
        if imported in sources:
            below[module].add(imported)
    done: set[str] = set()

    def from_here(path: list[str]) -> list[str]:
        for module in sorted(below[path[-1]] - done):
            if module in path:
                return path[path.index(module) :]
            if found := from_here([*path, module]):
                return found
        done.add(path[-1])
        return []

    return next(filter(None, (from_here([module]) for module in sources if module not in done)), [])


def loaded_slowly(sources: dict[str, str], start: str) -> dict[str, str]:
    """{module of SLOW: the module that imports it} as `start` is imported."""
    at_once: dict[str, set[str]] = {module: set() for module in sources}
    for module, imported, immediately in imports_of(sources):
        if immediately:
            at_once[module].add(imported)
    seen, queue, slow = set(), [start], {}
    while queue:
        module = queue.pop()
        if module in seen or module not in sources:
            continue
        seen.add(module)
        parents = {module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)}
        queue += at_once[module] | parents
        slow |= {name: module for name in at_once[module] if name.split(".")[0] in SLOW}
    return slow


@pytest.fixture(scope="module")
def sources():
    """{module: source} of all packages."""
    root = Path(__file__).parents[1]
    files = [file for package in ("engram_jax", "experiments", "tpu") for file in (root / package).rglob("*.py")]
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f.read_text() for f in files}


@pytest.fixture(scope="module")
def rooms():
    return [line.split()[0] for line in ROOMS.splitlines() if line]


def test_every_import_leads_down(sources, rooms):
    assert not upward(sources, rooms)


def test_no_modules_import_each_other(sources):
    assert not circle(sources)


def test_every_room_is_there(sources, rooms):
    assert {room_of(module, rooms) for module in sources} == set(rooms)


@pytest.mark.parametrize("start", STARTS_WITHOUT_JAX)
def test_starts_without_jax(sources, start):
    assert not loaded_slowly(sources, start)


def test_what_is_wrong_is_found():
    house = {
        "p": "",
        "p.a": "import numpy",
        "p.b": "from p.a import x",
        "p.b.c": "from p import b\n\ndef later():\n    import jax.numpy\n    from p.top import x",
        "p.top": "from typing import TYPE_CHECKING\nfrom p.b.c import x\nif TYPE_CHECKING:\n    import flax",
    }
    order = ["p", "p.a", "p.b", "p.top"]
    assert upward(house, order) == ["p.b.c imports p.top"]
    assert circle(house) == ["p.b.c", "p.top"]
    assert not circle(house | {"p.top": ""}) and not loaded_slowly(house, "p.top")
    assert loaded_slowly(house | {"p.a": "try:\n    import jax.lax\nexcept ImportError:\n    pass"}, "p.top") == {
        "jax.lax": "p.a"
    }
    with pytest.raises(AssertionError, match=r"p\.new is in none of ROOMS"):
        room_of("p.new", order)
