"""Studies: equal costs are proved, and the findings are those of the numbers."""

import json
import re

import numpy as np
import pytest
from finished_runs import findings_of, finish, the
from pictures import check_picture
from scipy import stats

from engram_jax.config import ConfigError, replace
from engram_jax.counts import flops_per_token, parameters, sparse_parameters
from engram_jax.errors import RunError
from experiments import study as command
from experiments.runs.sizes import engram_tiny, moe_tiny
from experiments.studies import STUDIES
from experiments.studies.engine import fits
from experiments.studies.engine.declared import TOTAL, Point, by_series, prove
from experiments.studies.engine.execute import run_dir
from experiments.studies.engine.findings import Best, Line, NotFitted, Unfinished, Valley, difference_of
from experiments.studies.engine.picture import ABOVE, figure
from experiments.studies.engine.report import write_report
from experiments.studies.engine.results import results
from experiments.studies.engine.sentences import difference, sentences
from experiments.studies.trained.allocation import ALLOCATION


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


def test_allocation_takes_every_share_that_can_be_had():
    """Of 16 experts, 81 % is nearest to both 80 and 90 %, and meets only one of them."""
    base = replace(ALLOCATION.scales["tiny"](), model__moe__n_routed_experts=16)
    assert 81 in {round(point.x) for point in ALLOCATION.points(base) if point.series == "C"}


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
        (["nothing"], "there is no study 'nothing'; there are pair, allocation"),
        (["allocation", "--scale", "huge"], "--scale huge: allocation has no such size; it has tiny, small"),
        (["allocation", "--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["allocation", "--train.seed", "3"], "train.seed=3: a study sets the seeds itself"),
        (["allocation", "--train.step", "3"], "nearest is '--train.steps'"),
        (["allocation", "--model.moe.n_routed_experts", "3"], "model.moe.n_routed_experts=3 .*allows only"),
        (["allocation", "--model.num_hidden_layers", "2"], "model.num_hidden_layers=2"),
        (["allocation", "--report_only", "--out", "nowhere"], "nowhere/allocation/tiny has no plan.json"),
        (["pair", "--model.moe.moe_intermediate_size", "3"], "model.moe.moe_intermediate_size=3: .* below 4"),
        (["pair", "--out", "/dev/null"], "/dev/null/pair/tiny cannot be written .* another --out"),
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


# --- the findings ---


def test_a_valley_is_found_with_its_interval(tmp_path, points):
    valley(points, tmp_path, seeds=3, lowest=72)
    found = findings_of(ALLOCATION, points, 3, tmp_path)
    curve = the(found, Valley)
    assert curve.is_found and curve.low < curve.lowest < curve.high and curve.high - curve.low < 10
    assert curve.lowest == pytest.approx(72, abs=2) and (curve.first, curve.last) == (points[0].x, points[-1].x)
    best = the(found, Best)
    assert best.difference.theirs == best.baseline == "rho100" and best.points == len(points)
    assert best.difference.spread == "more"  # though seeds lie 0.1 apart

    text = write_report(ALLOCATION, points, 3, tmp_path)
    for finding in found:
        assert all(f"- {sentence}" in text for sentence in sentences(finding))
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
    assert not the(findings_of(ALLOCATION, points, 3, tmp_path), Valley).is_found


def test_unfinished_studies_say_so(tmp_path, points):
    with pytest.raises(RunError, match="no finished run yet"):
        write_report(ALLOCATION, points, 2, tmp_path)
    valley(points, tmp_path, seeds=1, lowest=72)
    found = findings_of(ALLOCATION, points, 2, tmp_path)
    assert the(found, Unfinished) == Unfinished(len(points), 2 * len(points))
    assert the(found, NotFitted).lacks == "two seeds" and the(found, Best).difference.spread == "unknown"
    for point in points[1:]:
        (run_dir(tmp_path, point, 0) / "result.json").unlink()
    assert the(findings_of(ALLOCATION, points, 1, tmp_path), NotFitted).lacks == "a whole seed"


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
    # Against the interval of ordinary least squares, which is Student's: few points are as well served as many.
    for P, S in ((4, 2), (4, 3), (7, 3)):
        loss_PS = rng.normal(4, 0.01, (P, S))
        curve = fits.fit("log_line", x[:P], loss_PS)
        low, high = curve.interval(lambda c: c[0])
        centred, from_mean = loss_PS - loss_PS.mean(axis=0), np.log10(x[:P]) - np.log10(x[:P]).mean()
        slope, freedom = (from_mean @ centred).sum() / (S * from_mean @ from_mean), P * S - S - 1
        error = np.sqrt(np.square(centred - slope * from_mean[:, None]).sum() / freedom / (S * from_mean @ from_mean))
        assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, freedom) * error, rel=0.12)


def test_differences_are_held_against_the_spread():
    clear = difference_of(-np.array([0.30, 0.31, 0.32]), "a", "b")
    # Mean 0.31, standard deviation 0.01, and 4.3027 of Student's t with 2 degrees of freedom.
    assert clear.spread == "more" and clear.by.interval() == pytest.approx((-0.3348, -0.2852), abs=5e-5)
    assert difference_of(np.array([0.1, -0.05, 0.2]), "a", "b").spread == "within"
    assert difference_of(np.array([0.3]), "a", "b").spread == "unknown"


# --- sentences: one test for each kind ---


def test_sentence_of_a_difference():
    by_S = -np.array([0.30, 0.31, 0.32])
    assert difference(difference_of(by_S, "a", "b")) == (
        "a against b: -0.3100 nats per token (seed by seed -0.3000, -0.3100, -0.3200; "
        "95 % interval -0.3348 to -0.2852): more than the spread over seeds."
    )
    assert "with one seed the spread over seeds is unknown" in difference(difference_of(by_S[:1], "a", "b"))


def test_sentences_of_curves():
    valley = Valley("C", "rho", 72.04, 70.0, 75.0, 40.0, 100.0, 0.4, True)
    assert sentences(valley) == [
        "C: The fitted parabola is lowest at 72.0 (95 % interval 70.0 to 75.0), on the axis of 'rho'."
    ]
    [beyond] = sentences(Valley("", "rho", 72.0, 30.0, 75.0, 40.0, 100.0, 0.001, False))
    assert beyond.startswith("Where the loss is lowest is not found") and "points do not follow the curve" in beyond
    assert sentences(Line("", -0.05, -0.06, -0.04, 0.4, True)) == [
        "The loss falls along the fitted line by -0.0500 nats per decade (95 % interval -0.0600 to -0.0400)."
    ]
    [flat] = sentences(Line("", 0.01, -0.06, 0.04, 0.4, True))
    assert flat.startswith("The fitted line's slope is not more than the spread")
    assert sentences(NotFitted("", "a whole seed")) == ["No seed has all its points yet, so nothing is compared."]
    assert sentences(Best("", "b", None, 3)) == ["No point is better than b, the baseline."]
    assert sentences(Unfinished(2, 6)) == ["NOT finished: 2 of 6 runs are missing."]


# --- the picture ---


def test_both_panels_of_a_valley_show_the_loss_above_the_lowest_point(tmp_path, points):
    """Also with one budget, and with too few points for a curve."""
    valley(points, tmp_path, seeds=2, lowest=72)
    for shown in (points, points[:3]):
        made = figure(ALLOCATION, shown, results(shown, 2, tmp_path))
        check_picture(made)
        ours, papers = made.axes
        assert ours.get_ylabel() == papers.get_ylabel() == ABOVE
        assert min(line.get_ydata().min() for line in ours.lines if len(line.get_xdata())) < 0.02
