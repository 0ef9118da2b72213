"""The task that docs/extending.md shows, registered from outside the package and measured by `engram-jax evaluate`."""

import pytest
from examples import module_of

from engram_jax.commands.evaluate import main, parse
from engram_jax.evaluation.results import load
from engram_jax.registries import TASKS


@pytest.fixture
def example(tmp_path_factory):
    module = module_of("extending.md", "class Repetition", tmp_path_factory.mktemp("package"))
    TASKS.register("repetition", module.Repetition)
    yield module
    TASKS.unregister("repetition")


def test_the_example_measures_a_run(capsys, run_dir, tmp_path, example):
    options = ["--tasks", "repetition", "--repetition.max_tokens", "12", "--repetition.order", "1", "--limit", "5"]
    assert main([str(run_dir), *options, "--batch_tokens", "256", "--output", str(tmp_path)]) == 0
    assert "repetition: repeated (share of n-grams)" in capsys.readouterr().out
    [file] = tmp_path.iterdir()
    found = load(file)["tasks"]["repetition"]
    assert found["options"] == {"max_tokens": 12, "order": 1} and found["metrics"]["repeated"]["clusters"] == 5
    assert 0 <= found["metrics"]["repeated"]["value"] < 1 and found["details"]["first"]


def test_the_examples_measure(example):
    assert example.repeated([1, 2, 3, 1, 2, 3], 2) == pytest.approx(1 - 3 / 5)
    assert example.repeated([1, 2, 3, 4], 2) == 0 and example.repeated([1], 2) == 0


def test_the_examples_options_are_the_commands(capsys, example):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert "--repetition.max_tokens" in out and "New tokens for each document." in out
    assert main(["--list"]) == 0
    assert "Share of n-grams in a continuation that repeat an earlier one." in capsys.readouterr().out
    assert main(["run", "--tasks", "repetition", "--repetition.order", "0"]) == 2
    assert "repetition.order=0 must lie in 1..max_tokens." in capsys.readouterr().err
