"""engram-jax evaluate: what it writes, what it shows, and what it says of mistakes."""

import errno
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engram_jax.commands import evaluate as command
from engram_jax.commands.evaluate import file_name, main, parse
from engram_jax.evaluation.results import load, metric_of
from engram_jax.evaluation.statistics import Metric, difference
from engram_jax.evaluation.tasks import Result
from engram_jax.registries import TASKS


@dataclass(frozen=True)
class Counting:
    """Adds the numbers from 0 up."""

    up_to: int = 3
    """The last number."""

    def __call__(self, model, shared, argument=""):
        metrics = {"sum": Metric(float(sum(range(self.up_to + 1))), 0.5), "nothing": Metric(math.nan)}
        return Result(metrics, {"argument": argument, "numbers": np.arange(2), "largest": np.float32(2)})


@pytest.fixture
def counting():
    """A registered task of which nothing is known beforehand: options, an argument, a number that is none."""
    yield TASKS.register("counting", Counting)
    TASKS.unregister("counting")


@pytest.fixture
def runs(run_dir, bare_run_dir, tmp_path):
    """Copies, to write results into."""
    for folder in (run_dir, bare_run_dir):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / run_dir.name, tmp_path / bare_run_dir.name


def table_row(out: str, name: str) -> list[str]:
    [line] = [line for line in out.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_two_runs_side_by_side(capsys, runs):
    with_memory, bare = runs
    options = ["--limit", "4", "--perplexity.stride", "48", "--batch_tokens", "256"]
    assert main([str(with_memory), str(bare), *options, "--seed", "5"]) == 0
    out = capsys.readouterr().out
    records = [load(file) for path in runs for file in (path / "evaluations").glob("perplexity-*.json")]
    for record, name in zip(records, ("with_memory", "without_memory"), strict=True):
        assert record["run"]["name"] == name and record["run"]["step"] == 4 and record["seed"] == 5
        assert record["run"]["config"]["model"]["hidden_size"] == 32
        assert {"python", "jax", "jaxlib", "flax", "numpy", "engram_jax"} <= set(record["versions"])
        assert record["command"][:3] == ["engram-jax", "evaluate", str(with_memory)]
        assert record["commit"] is None or len(record["commit"].removesuffix("+changes")) == 40
        assert record["tasks"]["perplexity"]["options"] == {"context": 0, "stride": 48, "ngram_order": 3}
        assert record["tasks"]["perplexity"]["details"]["stride"] == 48
    assert [record["memory_scale"] for record in records] == [{"0": 1.0, "1": 1.0}, {}]

    [ours, theirs] = [record["tasks"]["perplexity"] for record in records]
    losses = [metric_of(task["metrics"]["loss"]) for task in (ours, theirs)]
    assert table_row(out, "perplexity: loss (nats per token)") == [f"{m.value:.4f} ± {m.stderr:.4f}" for m in losses]
    per_document = [np.array(task["details"]["per_document"]["loss"]) for task in (theirs, ours)]
    paired = difference(*per_document, ours["details"]["per_document"]["tokens"])
    assert table_row(out, "perplexity: loss, minus with_memory") == ["-", f"{paired.value:+.4f} ± {paired.stderr:.4f}"]
    assert "perplexity: loss by occurrences of the last n-gram in training" in out and "scored other" not in out

    assert main([str(bare), str(with_memory), "--table"]) == 0
    again = capsys.readouterr().out
    assert table_row(again, "perplexity: loss (nats per token)")[::-1] == table_row(
        out, "perplexity: loss (nats per token)"
    )


def test_the_knock_out_is_a_column_of_its_own(capsys, runs, counting):
    with_memory, _ = runs
    for scale in ([], ["--memory_scale", "0"], ["--memory_scale", "1=0.5"]):
        assert main([str(with_memory), "--tasks", "counting", *scale]) == 0
    names = sorted(path.name for path in (with_memory / "evaluations").iterdir())
    assert names == ["counting-memory-0.json", "counting-memory-1=0.5.json", "counting.json"]
    capsys.readouterr()
    assert main([str(with_memory), "--table"]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    for label in (" with_memory ", " with_memory (memory 0) ", " with_memory (memory 0=1 1=0.5) "):
        assert f"|{label}" in header
    assert load(with_memory / "evaluations" / "counting-memory-0.json")["memory_scale"] == {"0": 0.0, "1": 0.0}


def test_any_task_of_the_registry(capsys, runs, counting, tmp_path):
    """With its options, its argument, and numbers that JSON does not know."""
    with_memory, _ = runs
    options = [
        "--tasks",
        "counting:apples",
        "--counting.up_to",
        "4",
        "--name",
        "fruit",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([str(with_memory), *options]) == 0
    assert table_row(capsys.readouterr().out, "counting:apples: sum") == ["10.0000 ± 0.5000"]
    text = (tmp_path / "out" / "fruit.json").read_text()
    assert "NaN" not in text
    task = json.loads(text)["tasks"]["counting:apples"]
    assert task["options"] == {"up_to": 4} and task["metrics"]["nothing"]["value"] is None
    assert task["details"] == {"argument": "apples", "numbers": [0, 1], "largest": 2.0}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fruit.json"]


def test_the_paper_beside_it(capsys, runs, counting):
    with_memory, _ = runs
    assert main([str(with_memory), "--tasks", "counting", "--paper"]) == 0
    out = capsys.readouterr().out
    assert table_row(out, "Pile (loss)") == ["-", "2.091", "1.960", "1.950", "1.942"]
    assert table_row(out, "RULER NIAH multi-query") == ["-", "84.2", "89.5", "97.0", "97.0"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "give the folders"),
        (["{run}/nowhere"], 1, "is not a run"),
        (["{run}", "--tasks", "perplexty"], 2, "there is no task 'perplexty'; the nearest is 'perplexity'"),
        (["{run}", "--tasks", "x"], 2, "there is no task 'x'; there are perplexity, longppl, ruler, lm_eval"),
        (["{run}", "--limit", "-1"], 2, "limit=-1"),
        (["{run}", "--perplexity.strid", "3"], 2, "'--perplexity.strid'; the nearest is '--perplexity.stride'"),
        (["{run}", "--corpu", "x"], 2, "the nearest is '--corpus'"),
        (["{run}", "--perplexity.stride", "-3"], 2, "perplexity.stride=-3"),
        (["{run}", "--memory_scale", "7=0"], 2, "'7' is not an Engram layer"),
        (["{bare}", "--memory_scale", "0"], 2, "no memory to scale"),
        (["{run}", "{bare}", "--output", "x"], 2, "--output=x"),
        (["{run}", "--name", "a/b"], 2, "name='a/b'"),
        (["{run}", "--table"], 2, "has no results"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_computed(
    capsys, monkeypatch, run_dir, bare_run_dir, options, status, message
):
    from engram_jax.evaluation.evaluated_run import EvaluatedRun

    monkeypatch.setattr(EvaluatedRun, "load", None)
    assert main([option.format(run=run_dir, bare=bare_run_dir) for option in options]) == status
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    assert message in streams.err


def name_for(*options: str) -> str:
    return file_name(*parse(["run", *options]))


def test_another_question_has_another_name(tmp_path, monkeypatch):
    questions = [
        [],
        ["--limit", "10"],
        ["--limit", "20"],
        ["--seed", "10"],
        ["--perplexity.context", "10"],
        ["--text_key", "content"],
        ["--tasks", "lm_eval:hellaswag"],
        ["--tasks", "lm_eval:hellaswag", "--lm_eval.fewshot", "10"],
        ["--tasks", "ruler", "--ruler.lengths", "256", "512"],
        ["--tasks", "ruler", "--ruler.samples", "7"],
        ["--corpus", "/a/test"],
        ["--corpus", "/b/test"],
        ["--tasks", *[f"lm_eval:{i:020}" for i in range(10)]],
        ["--tasks", *[f"lm_eval:{i:020}" for i in range(10)], "--memory_scale", "0"],
    ]
    names = [name_for(*question) for question in questions]
    assert len(set(names)) == len(questions) and all(len(name) < 200 for name in names)
    assert names == [name_for(*question) for question in questions]
    for folder in ("a", "b"):
        (tmp_path / folder / "test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    ours = name_for("--corpus", "test")
    assert ours == name_for("--corpus", f"{tmp_path}/a/test/")
    monkeypatch.chdir(tmp_path / "b")
    assert ours != name_for("--corpus", "test")


def test_defaults_leave_the_name_alone():
    """Also options that a task not asked for has, and those that do not touch the numbers."""
    assert name_for() == "perplexity"
    assert name_for("--tasks", "perplexity", "longppl", "--memory_scale", "0") == "perplexity+longppl-memory-0"
    assert name_for("--ruler.samples", "7", "--limit", "0", "--batch_tokens", "64") == "perplexity"
    assert name_for("--corpus", "python") == "perplexity-python"


def test_a_try_out_leaves_the_full_answer(runs, counting):
    with_memory, _ = runs
    for options in ([], ["--limit", "1"], ["--counting.up_to", "4"], ["--limit", "1"]):
        assert main([str(with_memory), "--tasks", "counting", *options]) == 0
    found = {path.name: load(path) for path in (with_memory / "evaluations").iterdir()}
    assert len(found) == 3 and found["counting.json"]["shared"]["limit"] == 0
    assert found["counting.json"]["tasks"]["counting"]["options"] == {"up_to": 3}


def one_line(capsys, status: int, *arguments) -> str:
    assert main([*map(str, arguments)]) == status
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    return streams.err


def test_folders_are_tried_before_a_model_is_loaded(capsys, monkeypatch, runs, tmp_path):
    from engram_jax.evaluation.evaluated_run import EvaluatedRun

    monkeypatch.setattr(EvaluatedRun, "load", None)
    with_memory, bare = runs
    (bare / "evaluations").write_text("a file where a folder should be")
    assert f"cannot write {bare}/evaluations/perplexity.json" in one_line(capsys, 1, with_memory, bare)
    (tmp_path / "out" / "perplexity.json").mkdir(parents=True)
    assert "Is a directory. Give --output" in one_line(capsys, 1, with_memory, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["perplexity.json"]

    def refused(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)  # tests run as root, to whom nothing is refused
    assert "Permission denied. Give --output" in one_line(capsys, 1, with_memory)


def test_results_that_cannot_be_saved_any_more_are_shown(capsys, monkeypatch, runs, counting):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engram_jax.files.write_json", full)
    with_memory, _ = runs
    assert main([str(with_memory), "--tasks", "counting"]) == 1
    streams = capsys.readouterr()
    assert table_row(streams.out, "counting: sum") == ["6.0000 ± 0.5000"]
    assert "No space left on device" in streams.err and "The numbers are printed above" in streams.err


def test_a_folder_that_may_not_be_entered_is_one_line(capsys, monkeypatch, run_dir):
    def refused(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refused)  # as Path.exists meets it below such a folder
    monkeypatch.setattr(Path, "read_text", refused)
    assert "Permission denied" in one_line(capsys, 2, run_dir)
    assert "Permission denied" in one_line(capsys, 2, run_dir, "--table")


def test_results_that_cannot_be_read_are_named(capsys, runs):
    with_memory, _ = runs
    (with_memory / "evaluations").mkdir()
    for text, message in (
        ("{", "cannot be read"),
        ('{"a": 1}', "is not a results file"),
        ('{"format": 9, "tasks": {}, "run": {}}', "format 9"),
    ):
        (with_memory / "evaluations" / "x.json").write_text(text)
        assert main([str(with_memory), "--table"]) == 2
        assert message in capsys.readouterr().err


def test_help_lists_the_tasks_and_their_options(capsys, counting):
    with pytest.raises(SystemExit) as stopped:
        command.parse(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in ("--tasks", "--corpus", "--memory_scale", "--perplexity.stride", "--longppl.short_context"):
        assert word in out
    assert "--counting.up_to" in out and "The last number." in out


def test_list_names_every_task(capsys, counting):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*TASKS] and lines[-1] == "counting    Adds the numbers from 0 up."
    assert all(len(line.split()) > 4 for line in lines)


@dataclass(frozen=True)
class EntryPoint:
    """What importlib.metadata gives for a line of another package's pyproject.toml."""

    name: str
    value: str
    loaded: object = None

    def load(self):
        if self.loaded is None:
            raise ImportError("No module named 'their_package'")
        return self.loaded


@pytest.fixture
def installed(monkeypatch):
    """Makes entry points of another package appear."""

    def install(*points):
        monkeypatch.setattr(TASKS, "_entries", dict(TASKS._entries))
        monkeypatch.delattr(TASKS, "_installed", raising=False)
        monkeypatch.setattr("engram_jax.registries.entry_points", lambda group: {"engram_jax.tasks": points}[group])

    return install


def test_a_task_of_another_package(capsys, runs, installed):
    """By an entry point, without a line in this package."""
    installed(EntryPoint("theirs", "their_package.tasks:Counting", Counting))
    with_memory, _ = runs
    assert main([str(with_memory), "--tasks", "theirs", "--theirs.up_to", "4"]) == 0
    assert table_row(capsys.readouterr().out, "theirs: sum") == ["10.0000 ± 0.5000"]


def test_a_task_that_cannot_be_imported_is_named(capsys, run_dir, installed):
    installed(EntryPoint("theirs", "their_package.tasks:Counting"))
    assert main([str(run_dir), "--tasks", "theirs"]) == 2
    error = capsys.readouterr().err
    assert "the task 'theirs' (their_package.tasks:Counting) cannot be imported" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["limit", "name", "my-task"])
def test_a_task_with_the_name_of_an_option_is_refused(capsys, run_dir, name):
    TASKS.register(name, Counting)
    try:
        assert main([str(run_dir)]) == 2
        assert f"the task {name!r} needs another name" in capsys.readouterr().err
    finally:
        TASKS.unregister(name)
