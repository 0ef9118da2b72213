"""Studies as they run: shared, resumed, continued from raw numbers, on the corpus that they began with."""

import argparse
import dataclasses
import fcntl
import json
import multiprocessing
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from finished_runs import finish

from engram_jax.config import ConfigError, replace
from engram_jax.errors import MISTAKEN, TERMINATED
from engram_jax.files import write_text
from experiments import study as command
from experiments.studies import STUDIES
from experiments.studies.engine.declared import Point
from experiments.studies.engine.execute import agree_on_plan, execute, run_dir
from experiments.studies.engine.finished_runs import runs_from_files
from experiments.studies.engine.results import results

# --- shared and resumed ---


def test_a_killed_study_continues_and_finished_runs_are_not_repeated(tmp_path, points):
    trained = []

    def train(config, folder, stop_at=3):
        trained.append(folder.name)
        return finish(config, folder) if len(trained) != stop_at else TERMINATED

    assert execute(tmp_path, points[:2], 2, train, print) == TERMINATED
    assert execute(tmp_path, points[:2], 2, train, print) == 0
    a, b = points[0].name, points[1].name
    assert trained == [f"{a}-seed0", f"{b}-seed0", f"{a}-seed1", f"{a}-seed1", f"{b}-seed1"]
    assert execute(tmp_path, points[:2], 2, None, print) == 0


def hold(path, taken, done):
    with path.open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        taken.set()
        done.wait(60)


def test_a_run_of_another_process_is_left_to_it(tmp_path, points):
    claims = tmp_path / "claims"
    claims.mkdir()
    context = multiprocessing.get_context("spawn")
    taken, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(claims / f"{points[0].name}-seed0.lock", taken, done))
    other.start()
    assert taken.wait(60)
    lines, trained = [], []

    def train(config, folder):
        trained.append(folder.name)
        return finish(config, folder)

    assert execute(tmp_path, points[:2], 1, train, lines.append) == 0
    assert trained == [f"{points[1].name}-seed0"] and any("another process" in line for line in lines)
    done.set()
    other.join(60)
    assert execute(tmp_path, points[:2], 1, train, lines.append) == 0
    assert trained == [f"{points[1].name}-seed0", f"{points[0].name}-seed0"]


def test_a_folder_of_another_plan_is_refused(tmp_path, points):
    folder = tmp_path / "study"
    agree_on_plan(folder, "allocation", points)
    agree_on_plan(folder, "allocation", points)
    longer = [Point(p.name, p.x, replace(p.config, train__steps=121)) for p in points]
    with pytest.raises(ConfigError, match=r"train.steps: 121 here, 120 there.*and 5 more.*--out"):
        agree_on_plan(folder, "allocation", longer)
    with pytest.raises(ConfigError, match="points: "):
        agree_on_plan(folder, "allocation", points[1:])
    # How often something is logged changes no number.
    agree_on_plan(folder, "allocation", [Point(p.name, p.x, replace(p.config, train__log_every=1)) for p in points])
    # Points that it lacked are added, and must be agreed with from then on.
    agree_on_plan(folder, "allocation", [*points, dataclasses.replace(points[0], name="new")])
    assert json.loads((folder / "plan.json").read_text())["points"][-1]["name"] == "new"
    with pytest.raises(ConfigError, match=r"points: .* here, .*, new there"):
        agree_on_plan(folder, "allocation", points)
    (folder / "plan.json").unlink()
    (folder / "plan.json.abc.tmp").touch()  # of a process that was killed while it wrote
    agree_on_plan(folder, "allocation", points)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"has files and no plan.json"):
        agree_on_plan(tmp_path / "other", "allocation", points)


def test_processes_may_begin_and_report_at_once(tmp_path, points):
    finish(points[0].seeded(0), run_dir(tmp_path / "done", points[0], 0))

    def begin(number):
        agree_on_plan(tmp_path / f"study{number % 20}", "allocation", points[:2])

    def report(_):
        write_text(tmp_path / "report.md", "a" * 10_000)
        return (tmp_path / "report.md").read_text() == "a" * 10_000

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(begin, range(160)))
        assert all(threads.map(report, range(200)))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_run_with_other_settings_is_refused(tmp_path, points):
    finish(replace(points[0].seeded(0), train__steps=9), run_dir(tmp_path, points[0], 0))
    with pytest.raises(ConfigError, match=r"train.steps: 120 here, 9 there.*another --out"):
        execute(tmp_path, points[:2], 1, None, print)


# --- runs that were finished elsewhere ---


def test_what_is_known_is_not_trained_again(tmp_path, points, monkeypatch, capsys):
    """A study goes on from raw numbers alone, also of another study: `layers` and `ablations` share two points."""
    trained = []

    def train(config, folder):
        trained.append(folder.name)
        return finish(config, folder, 4 + 0.01 * len(trained))

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "check_corpus", lambda *_: None)
    ours, theirs = ["--out", str(tmp_path / "ours")], ["--out", str(tmp_path / "theirs")]
    assert command.main(["layers", "--seeds", "2", *ours]) == 0
    file = tmp_path / "ours" / "layers" / "tiny" / "results.jsonl"
    assert len(trained) == len(file.read_text().splitlines()) == 12
    report = (file.parent / "report.md").read_text()

    trained.clear()
    files = ["--results", str(file)]
    assert command.main(["layers", "--seeds", "2", "--report_only", *theirs, *files]) == 0
    assert (tmp_path / "theirs" / "layers" / "tiny" / "report.md").read_text() == report and not trained
    assert (tmp_path / "theirs" / "layers" / "tiny" / "results.jsonl").read_text() == file.read_text()
    assert command.main(["layers", "--seeds", "3", *theirs, *files]) == 0
    assert trained == [f"{name}-seed2" for name in ("two", "layer0", "layer1", "layer2", "layer3", "moe")]

    trained.clear()
    assert command.main(["ablations", "--points", "reference", "moe", "no_gate", "--seeds", "2", *theirs, *files]) == 0
    assert trained == ["no_gate-seed0", "no_gate-seed1"]
    capsys.readouterr()
    for other in ("--train.steps", "--train.eval_batches_final"):  # how much text a loss is measured on is no detail
        assert command.main(["layers", other, "90", "--print", "--seeds", "2", *theirs, *files]) == MISTAKEN
        assert "none of its 12 runs belongs to this study" in capsys.readouterr().err
    assert command.main(["layers", "--train.eval_every", "90", "--print", *theirs, *files]) == 0
    assert "--results has 12 of them" in capsys.readouterr().out


def test_a_report_takes_in_all_that_is_there(tmp_path, points, monkeypatch, capsys):
    monkeypatch.setattr(command, "train", finish)
    monkeypatch.setattr(command, "check_corpus", lambda *_: None)
    ours, theirs = ["--out", str(tmp_path / "ours")], ["--out", str(tmp_path / "theirs")]
    file = tmp_path / "ours" / "pair" / "tiny" / "results.jsonl"

    def lines():
        return len(file.read_text().splitlines())

    assert command.main(["pair", *ours]) == 0 and lines() == 6
    assert command.main(["pair", "--seeds", "5", *ours]) == 0 and lines() == 10
    assert command.main(["pair", "--report_only", *ours]) == 0 and lines() == 10
    assert command.main(["pair", "--report_only", *theirs, "--results", str(file)]) == 0
    assert (tmp_path / "theirs" / "pair" / "tiny" / "results.jsonl").read_text() == file.read_text()
    capsys.readouterr()
    assert command.main(["pair", "--report_only", "--seeds", "1", *ours, "--results", str(file)]) == MISTAKEN
    assert "writes its own numbers there" in capsys.readouterr().err and lines() == 10


NUMBERS = '"settings": "a", "seed": 0, "bits_per_byte": 1.5, "corpus_sha256": "c"'
DAMAGED = ["no json", '{"seed": 0}', "[1]", None, f"{{{NUMBERS}}}", f'{{{NUMBERS}, "validation_loss": NaN}}']


@pytest.mark.parametrize("text", DAMAGED)
def test_files_without_raw_numbers_are_refused(tmp_path, text, capsys):
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    assert command.main(["pair", "--print", "--out", str(tmp_path), "--results", str(file)]) == MISTAKEN
    assert f"--results {file}: not the raw numbers" in capsys.readouterr().err
    assert command.main(["depth", "--print", "--results", str(file)]) == MISTAKEN


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"loss": 4.0}', '{"loss": null, "bits_per_byte": 1}'])
def test_a_damaged_result_names_its_file(tmp_path, points, text):
    finish(points[0].seeded(0), folder := run_dir(tmp_path, points[0], 0))
    (folder / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=r"seed0/result.json cannot be read .* delete it to train the run again"):
        results(points[:1], 1, tmp_path)


@pytest.mark.parametrize("text", ["[1]", '{"model": 3}', "{"])
def test_a_damaged_config_names_its_run(tmp_path, points, text):
    finish(points[0].seeded(0), folder := run_dir(tmp_path, points[0], 0))
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"seed0/config.json cannot be read"):
        results(points[:1], 1, tmp_path)


@pytest.mark.parametrize("name", ["pair", "allocation", "layers", "memory_scaling", "ablations"])
def test_published_numbers_are_those_of_the_study_as_it_is(name):
    """A change of its settings must not leave results behind that look like its own."""
    points = STUDIES[name].at(STUDIES[name].scales["tiny"]())
    file = Path(command.__file__).parent / "results" / name / "results.jsonl"
    lines = file.read_text().splitlines()
    assert len(runs_from_files([file], points, 3)) == len(lines) > 0


# --- the corpus ---


@pytest.fixture
def short_corpus(tmp_path, monkeypatch):
    """Command-line arguments for some 50,000 tokens of the standard library, as a folder; tokenised afresh."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("argparse", "ast", "inspect", "typing", "doctest"):
        shutil.copy(Path(argparse.__file__).with_name(f"{name}.py"), folder)
    return ["--data.corpus", str(folder), "--data.holdout_fraction", "0.3"]


def test_how_often_a_short_corpus_is_seen_is_said_before_anything_runs(tmp_path, monkeypatch, capsys, short_corpus):
    monkeypatch.setattr(command, "train", lambda *_: TERMINATED)
    assert command.main(["pair", "--out", str(tmp_path / "out"), *short_corpus]) == TERMINATED
    assert re.search(r"\nwarning: 1,024,000 tokens.*so the run sees .*/texts \d\d", capsys.readouterr().out)


def test_a_mistyped_corpus_leaves_no_plan(tmp_path, monkeypatch, capsys, short_corpus):
    out = ["--out", str(tmp_path / "out")]
    assert command.main(["pair", *out, "--data.corpus", str(tmp_path / "text")]) == MISTAKEN
    assert "no such file, folder or glob" in capsys.readouterr().err
    monkeypatch.setattr(command, "train", lambda *_: TERMINATED)
    assert command.main(["pair", *out, *short_corpus]) == TERMINATED


def test_another_corpus_than_that_of_finished_runs_is_refused_before_anything_runs(
    tmp_path, monkeypatch, capsys, short_corpus
):
    trained = []
    pair = ["pair", "--seeds", "2", *short_corpus]

    def train(config, folder):
        trained.append(folder.name)
        return finish(config, folder, corpus="another") if len(trained) < 3 else TERMINATED

    monkeypatch.setattr(command, "train", train)
    assert command.main([*pair, "--out", str(tmp_path / "a")]) == TERMINATED  # the first is trusted: nothing is known
    assert command.main([*pair, "--out", str(tmp_path / "a")]) == MISTAKEN
    assert "not the text that finished runs saw, such as moe-seed0" in capsys.readouterr().err
    assert command.main([*pair, "--out", str(tmp_path / "a"), "--report_only"]) == 0
    file = tmp_path / "a" / "pair" / "tiny" / "results.jsonl"
    assert command.main([*pair, "--out", str(tmp_path / "b"), "--results", str(file)]) == MISTAKEN
    assert "not the text" in capsys.readouterr().err and len(trained) == 3


# --- studies that look into runs ---


class Looking:
    """An analysis that says what it was given."""

    def of_runs(self, runs, folder):
        (folder / "results.jsonl").write_text("{}\n")
        return [f"Looked into {', '.join(f'{run.point}-{run.seed}' for run in runs)}."]

    def of_rows(self, rows, folder):
        return [f"Read {rows[0]['number']}."]


@pytest.fixture
def looking():
    """A study that looks into the pair's runs and says what it was given."""
    study = dataclasses.replace(STUDIES["pair"], name="looking", trained_in="pair", analysis=Looking())
    yield STUDIES.register("looking", study)
    STUDIES.unregister("looking")


def test_an_analysis_reports_on_raw_numbers_without_the_runs(capsys, tmp_path, looking):
    file, out = tmp_path / "rows.jsonl", ["--out", str(tmp_path / "out")]
    file.write_text('{"number": 7}\n')
    assert command.main(["looking", "--report_only", "--results", str(file), *out]) == 0
    report = (tmp_path / "out" / "looking" / "tiny" / "report.md").read_text()
    assert "Read 7." in report and str(file) in report and "| moe" in report
    capsys.readouterr()
    for text, options, message in (
        ('{"number": 7}', [], "only with --report_only"),
        ('{"other": 7}', ["--report_only"], "not the raw numbers of looking (KeyError('number'))"),
        ("", ["--report_only"], "not the raw numbers of looking"),
        ("no json", ["--report_only"], "not the raw numbers of looking"),
    ):
        file.write_text(text)
        assert command.main(["looking", *options, "--results", str(file), *out]) == MISTAKEN
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_runs_are_trained_once_for_all_that_look(capsys, tmp_path, monkeypatch, looking):
    trained = []

    def train(config, folder):
        trained.append(folder)
        return finish(config, folder)

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "check_corpus", lambda *_: None)
    assert command.main(["pair", "--out", str(tmp_path), "--seeds", "2"]) == 0
    assert command.main(["looking", "--out", str(tmp_path), "--seeds", "2"]) == 0
    assert len(trained) == 4 and {folder.parts[-4] for folder in trained} == {"pair"}
    report = (tmp_path / "looking" / "tiny" / "report.md").read_text()
    assert report in capsys.readouterr().out and "Looked into moe-0, engram-0, moe-1, engram-1." in report
    (trained[3] / "result.json").unlink()
    assert command.main(["looking", "--out", str(tmp_path), "--seeds", "2", "--report_only"]) == 0
    assert "Looked into moe-0, engram-0." in capsys.readouterr().out
    (trained[0] / "result.json").unlink()
    assert command.main(["looking", "--out", str(tmp_path), "--seeds", "2", "--report_only"]) == 1
    assert "no seed with all of its runs (moe, engram) finished" in capsys.readouterr().err
