"""Studies: equal costs are proved, runs are shared and resumed, and the report says what its numbers say."""

import dataclasses
import fcntl
import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest

from engram_jax.config import ConfigError, replace, to_dict
from engram_jax.counts import flops_per_token, parameters, sparse_parameters
from engram_jax.training.errors import FAILED, MISTAKEN, TERMINATED, RunError
from experiments import study as command
from experiments.runs import engram_tiny, moe_tiny
from experiments.studies import STUDIES, fits
from experiments.studies.allocation import ALLOCATION
from experiments.studies.declared import TOTAL, Point, by_series, prove
from experiments.studies.execute import agree_on_plan, execute, run_dir
from experiments.studies.known import known_runs
from experiments.studies.report import write_report


@pytest.fixture(scope="module")
def points():
    """The allocation study's at its tiny scale, of the smaller budget."""
    return by_series(ALLOCATION.at(ALLOCATION.scales["tiny"]()))["C"]


def finish(config, folder, loss=None, corpus="abc"):
    """What training leaves in a run's folder, without training."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = replace(config, model__engram__engram_compressed_vocab_size=77)
    (folder / "config.json").write_text(json.dumps(to_dict(resolved)))
    result = {"loss": loss or 4.0, "bits_per_byte": 1.5, "corpus_sha256": corpus, "buckets": {}}
    (folder / "result.json").write_text(json.dumps(result))
    return 0


def valley(points, study_dir, seeds, lowest, noise=0.002):
    """Finished runs with losses on a parabola, a shift for every seed and some noise."""
    rng = np.random.default_rng(5)
    for seed in range(seeds):
        for point in points:
            loss = 4 + 4e-4 * (point.x - lowest) ** 2 / 10 + 0.1 * seed + rng.normal(0, noise)
            finish(point.seeded(seed), run_dir(study_dir, point, seed), loss)


# --- equal costs ---


@pytest.mark.parametrize("name", STUDIES)
def test_points_cost_the_same(name):
    study = STUDIES[name]
    made = study.at(study.scales["tiny"]())
    assert len({p.config.data for p in made}) == 1 and len({p.name for p in made}) == len(made)
    for group in by_series(made).values():
        equal = [point for point in group if not point.varies]
        sizes = [parameters(point.config.model) for point in equal]
        flops = [flops_per_token(point.config.model, point.config.data.seq_len) for point in equal]
        counted = [[s.active for s in sizes], flops] + ([] if TOTAL in study.varies else [[s.total for s in sizes]])
        assert all(max(numbers) <= 1.01 * min(numbers) for numbers in counted)
        assert len({p.config.train.steps * p.config.data.seq_len * p.config.data.batch_size for p in group}) == 1


def test_allocation_spans_rho(points):
    rho = [100 * sparse_parameters(point.config.model)[1] for point in points]
    assert [point.x for point in points] == pytest.approx(rho, abs=0.01)
    assert rho == sorted(rho) and rho[0] < 45 and rho[-1] == 100 and len(rho) >= 6
    assert points[-1].config.model.moe == moe_tiny().model.moe


def test_memory_scaling_spans_slots():
    groups = by_series(STUDIES["memory_scaling"].at(STUDIES["memory_scaling"].scales["tiny"]()))
    assert list(groups) == ["Engram", "OverEncoding"]
    for made in groups.values():
        assert made[-1].x / made[0].x > 10**1.5
        assert {point.config.model.moe for point in made} == {engram_tiny().model.moe}
    # The same slots, of the same width, so far as primes allow.
    ours = {round(np.log2(point.x / 81_900)): point for point in groups["Engram"]}
    for point in groups["OverEncoding"]:
        twin = ours[round(np.log2(point.x / 81_900))]
        assert parameters(point.config.model).memory == pytest.approx(parameters(twin.config.model).memory, rel=0.06)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__moe__n_routed_experts": 30}, "b has .* total parameters and a has "),
        ({"model__moe__num_experts_per_tok": 3}, "b has .* active parameters and a has "),
        ({"data__seq_len": 1024, "data__batch_size": 4}, "b has .* FLOPs per token and a has "),
        ({"train__steps": 251}, "b has 1,028,096 tokens and a has 1,024,000: 0.4% apart"),
        ({"data__holdout_fraction": 0.1}, r"b has data.holdout_fraction=0.1 and a has 0.05"),
    ],
)
def test_unequal_runs_are_refused(change, message):
    run = moe_tiny()
    with pytest.raises(ConfigError, match=message):
        prove([Point("a", 0, run), Point("b", 1, replace(run, **change))])


def test_seeds_change_weights_and_order_alike(points):
    ours, theirs = points[0].seeded(2), points[1].seeded(2)
    assert (ours.train.seed, ours.data.seed, theirs.data.seed) == (2, 2, 2) and ours.data == theirs.data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["allocaton"], "nearest is 'allocation'"),
        (["--seeds", "2"], "name comes first"),
        (["allocation", "--scale", "huge"], "--scale huge: allocation has tiny, small"),
        (["allocation", "--seeds", "0"], "--seeds 0: give 1 or more"),
        (["allocation", "--train.seed", "3"], "train.seed=3: a study numbers its seeds"),
        (["allocation", "--train.step", "3"], "nearest is '--train.steps'"),
        (["allocation", "--model.moe.n_routed_experts", "3"], "model.moe.n_routed_experts=3 .*allows only"),
        (["allocation", "--model.num_hidden_layers", "2"], "model.num_hidden_layers=2"),
        (["allocation", "--report_only", "--out", "nowhere"], "nowhere/allocation/tiny has no plan.json"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train", None)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_print_shows_the_plan_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "train", None)
    assert command.main(["allocation", "--print", "--seeds", "2", "--out", str(tmp_path), "--train.steps", "7"]) == 0
    output = capsys.readouterr().out
    assert "rho100" in output and "28,672" in output and "18 points, 2 seeds: 36 runs, 0 of them finished" in output
    assert not list(tmp_path.iterdir())


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
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"holds files and no plan.json"):
        agree_on_plan(tmp_path / "other", "allocation", points)


def test_a_finished_run_with_other_settings_is_refused(tmp_path, points):
    finish(replace(points[0].seeded(0), train__steps=9), run_dir(tmp_path, points[0], 0))
    with pytest.raises(ConfigError, match=r"train.steps: 120 here, 9 there.*delete it"):
        execute(tmp_path, points[:2], 1, None, print)


# --- runs that were finished elsewhere ---


def test_what_is_known_is_not_trained_again(tmp_path, points, monkeypatch, capsys):
    """A study goes on from raw numbers alone, also of another study: `layers` and `ablations` share two points."""
    trained = []

    def train(config, folder):
        trained.append(folder.name)
        return finish(config, folder, 4 + 0.01 * len(trained))

    monkeypatch.setattr(command, "train", train)
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
    assert command.main(["layers", "--train.steps", "90", "--print", "--seeds", "2", *theirs, *files]) == 0
    assert "12 runs, 0 of them finished" in (said := capsys.readouterr().out) and "known from" not in said


def test_another_corpus_than_the_known_one_is_found_out_after_one_run(tmp_path, monkeypatch, capsys):
    trained = []

    def train(config, folder):
        trained.append(folder.name)
        return finish(config, folder, corpus="abc" if config.train.seed == 0 else "def")

    monkeypatch.setattr(command, "train", train)
    assert command.main(["pair", "--seeds", "1", "--out", str(tmp_path / "a")]) == 0
    file = tmp_path / "a" / "pair" / "tiny" / "results.jsonl"
    assert command.main(["pair", "--out", str(tmp_path / "b"), "--results", str(file)]) == FAILED
    assert len(trained) == 3 and "different corpora" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "no json", '{"seed": 0}', "[1]", None])
def test_files_without_raw_numbers_are_refused(tmp_path, text, capsys):
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    status = command.main(["pair", "--print", "--out", str(tmp_path), "--results", str(file)])
    assert (status == 0) is (text == "")
    assert text == "" or f"--results {file}: not the raw numbers" in capsys.readouterr().err
    assert command.main(["depth", "--print", "--results", str(file)]) == MISTAKEN


@pytest.mark.parametrize("name", ["pair", "allocation", "layers"])
def test_published_numbers_are_those_of_the_study_as_it_is(name):
    """A change of its settings must not leave results behind that look like its own."""
    points = STUDIES[name].at(STUDIES[name].scales["tiny"]())
    file = Path(command.__file__).parent / "results" / name / "results.jsonl"
    lines = file.read_text().splitlines()
    assert len(known_runs([file], points, 3)) == len(lines) > 0


# --- the report ---


def test_a_valley_is_found_with_its_interval(tmp_path, points):
    valley(points, tmp_path, seeds=3, lowest=72)
    text = write_report(ALLOCATION, points, 3, tmp_path)
    found = re.search(r"lowest at ([\d.]+) \(95 % interval ([\d.]+) to ([\d.]+)\)", text)
    assert found
    where, low, high = map(float, found.groups())
    assert low < where < high and where == pytest.approx(72, abs=2) and high - low < 10
    assert "against rho100: -0.0" in text and "): more than the spread" in text  # though seeds lie 0.1 apart
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * len(points)
    for point in points:
        losses = [row["validation_loss"] for row in rows if row["point"] == point.name]
        assert f"| {np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f} |" in text
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_noise_is_not_called_a_valley(tmp_path, points):
    rng = np.random.default_rng(8)
    for point in points:
        for seed in range(3):
            finish(point.seeded(seed), run_dir(tmp_path, point, seed), 4 + rng.normal(0, 0.02))
    text = write_report(ALLOCATION, points, 3, tmp_path)
    assert "Nothing found beyond the spread about where" in text and "parabola is lowest" not in text


def test_unfinished_studies_say_so(tmp_path, points):
    with pytest.raises(RunError, match="no finished run yet"):
        write_report(ALLOCATION, points, 2, tmp_path)
    valley(points, tmp_path, seeds=1, lowest=72)
    text = write_report(ALLOCATION, points, 2, tmp_path)
    assert f"NOT finished: {len(points)} of {2 * len(points)} runs" in text and "takes two seeds" in text


def test_another_corpus_is_refused(tmp_path, points):
    finish(points[0].seeded(0), run_dir(tmp_path, points[0], 0))
    finish(points[1].seeded(0), run_dir(tmp_path, points[1], 0), corpus="def")
    with pytest.raises(RunError, match="different corpora"):
        write_report(ALLOCATION, points, 1, tmp_path)


def test_a_lines_slope_and_interval():
    """95 % of the intervals hold the true slope, seeds' shifts or not."""
    rng, x = np.random.default_rng(3), 10.0 ** np.linspace(4, 6, 7)
    held = 0
    for _ in range(100):
        loss_PS = 4 - 0.05 * np.log10(x)[:, None] + rng.normal(0, 0.3, 3) + rng.normal(0, 0.01, (7, 3))
        curve = fits.fit("log_line", x, loss_PS)
        low, high = curve.interval(lambda c: c[0])
        held += low < -0.05 < high
    assert 86 <= held <= 100
    assert re.search(r"falls along the fitted line by -0\.0[456]", fits.sentence(curve, x, "slots"))
    flat = fits.fit("log_line", x, rng.normal(4, 0.01, (7, 3)))
    assert fits.sentence(flat, x, "slots").startswith("Nothing found")


def test_differences_are_held_against_the_spread():
    a = np.array([4.0, 4.5, 4.1])
    clear = fits.difference(a, a + np.array([0.30, 0.31, 0.32]), "a", "b")
    # Mean 0.31, standard deviation 0.01, and 4.3027 of Student's t with 2 degrees of freedom.
    assert "-0.3100 nats" in clear and "interval -0.3348 to -0.2852): more than" in clear
    assert "): nothing found" in fits.difference(a, a + np.array([0.1, -0.05, 0.2]), "a", "b")
    assert "unknown" in fits.difference(a[:1], a[:1] + 0.3, "a", "b")


# --- studies that look into runs ---


@pytest.fixture
def looking(monkeypatch):
    """A study that looks into the pair's runs and says what it was given."""

    def analyse(runs, folder):
        (folder / "results.jsonl").write_text("{}\n")
        return [f"Looked into {', '.join(f'{run.point}-{run.seed}' for run in runs)}."]

    study = dataclasses.replace(STUDIES["pair"], name="looking", trained_in="pair", analyse=analyse)
    monkeypatch.setitem(STUDIES, "looking", study)
    return study


def test_runs_are_trained_once_for_all_that_look(capsys, tmp_path, monkeypatch, looking):
    trained = []

    def train(config, folder):
        trained.append(folder)
        return finish(config, folder)

    monkeypatch.setattr(command, "train", train)
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
