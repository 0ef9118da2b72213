"""Every random test can be replayed from the seed it prints."""

import ast
import re
import shlex
from pathlib import Path

import pytest

pytest_plugins = "pytester"

RANDOM_TESTS = """
    import pytest

    @pytest.mark.parametrize("name", ["a b", "it's"])
    def test_fails(rng, name):
        assert False, f"drew {rng.integers(1 << 60)}"

    @pytest.fixture
    def number(rng):
        return rng.integers(1 << 60)

    def test_fails_by_a_fixture(number):
        assert False, f"drew {number}"

    def test_draws_nothing():
        assert False
"""


def drawn(result) -> list[str]:
    """Numbers of the failed tests, sorted, each once."""
    return sorted(set(re.findall(r"AssertionError: drew (\d+)", result.stdout.str())))


@pytest.fixture
def run(pytester, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line of the output is cut
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    tests = str(Path(__file__).parent)
    pytester.makeconftest(f"import sys\n\nsys.path.insert(0, {tests!r})\npytest_plugins = 'seeds'")
    pytester.makepyfile(test_random=RANDOM_TESTS)
    return lambda *args: pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q", *args)


def test_a_failure_is_replayed_by_the_command_it_prints(run):
    first = run()
    first.assert_outcomes(failed=4)
    numbers, commands = drawn(first), re.findall(r"^pytest (.*--seed \d+)$", first.stdout.str(), re.MULTILINE)
    assert len(numbers) == 3 and len(commands) == 3  # none of the test that draws nothing
    assert sorted(number for command in commands for number in drawn(run(*shlex.split(command)))) == numbers


def test_sessions_differ_unless_they_are_given_a_seed(run):
    assert not set(drawn(run())) & set(drawn(run()))
    assert drawn(run("--seed", "7")) == drawn(run("--seed", "7")) != drawn(run("--seed", "8"))


def test_workers_draw_the_numbers_of_one_process(run):
    alone = drawn(run("--seed", "7"))
    split = run("--seed", "7", "-p", "xdist", "-n", "2", "--dist=load", "-v")
    assert drawn(split) == alone
    split.stdout.fnmatch_lines(["seed of random tests: 7 (--seed 7 replays them)"])


MADE_WITH_A_SEED = {"default_rng", "Generator", "SeedSequence", "Random"}


def unseeded(source: str) -> list[int]:
    """Lines that draw numbers nobody can draw again: from a generator made without a seed, or from Python's own."""
    nodes = list(ast.walk(ast.parse(source)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    lines = []
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        *prefix, name = ast.unparse(call.func).split(".")
        seedless = name in MADE_WITH_A_SEED and not (call.args or call.keywords)
        own = prefix in (["random"], ["secrets"]) and prefix[0] in modules and name not in MADE_WITH_A_SEED
        lines += [call.lineno] * (seedless or own)
    return lines


def test_no_test_draws_without_a_seed():
    assert unseeded("import random\nrng = np.random.default_rng()\nrandom.randint(1, 4)\nrng.integers(3)") == [2, 3]
    assert not unseeded("import random\nrng = np.random.default_rng(3)\nrandom.Random(3).randint(1, 4)")
    tests = Path(__file__).parent
    found = {
        f"{file.relative_to(tests)}:{line}"
        for file in tests.rglob("*.py")
        for line in unseeded(file.read_text())
        if file.name != "seeds.py"
    }
    assert not found, "take the fixture rng, or give the generator a seed"
