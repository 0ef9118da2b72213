"""Studies whose points have no order, and studies of several curves: comparisons, findings, pictures."""

import json

import numpy as np
import pytest
from finished_runs import findings_of, finish, the
from pictures import check_picture
from scipy import stats

from engram_jax.config import ConfigError, replace
from engram_jax.config import differences as differences_of
from engram_jax.counts import flops_per_token, parameters
from engram_jax.evaluation.over_seeds import OverSeeds
from experiments import study as command
from experiments.runs.sizes import engram_tiny
from experiments.studies import STUDIES
from experiments.studies.engine import differences, fits
from experiments.studies.engine.declared import ACTIVE, FLOPS, TOTAL, Point, by_series, prove
from experiments.studies.engine.differences import Comparison, Differences
from experiments.studies.engine.execute import run_dir
from experiments.studies.engine.findings import Best, Line, LinesApart, LowestMoved, Unfinished, Valley, difference_of
from experiments.studies.engine.picture import figure
from experiments.studies.engine.report import budget_notes, write_report
from experiments.studies.engine.results import results
from experiments.studies.engine.sentences import sentences
from experiments.studies.trained.allocation import ALLOCATION
from experiments.studies.trained.layers import LAYERS


@pytest.fixture(scope="module")
def layers():
    return LAYERS.at(LAYERS.scales["tiny"]())


@pytest.fixture(scope="module")
def ablations():
    """The study's configs by name."""
    study = STUDIES["ablations"]
    return {point.name: point.config for point in study.at(study.scales["tiny"]())}


def write(point, seed, study_dir, loss):
    finish(point.seeded(seed), run_dir(study_dir, point, seed), float(loss))


# --- comparisons ---


def test_holm_is_the_step_down_correction():
    # Sorted 0.001, 0.013, 0.02, 0.03 times 4, 3, 2, 1, and none below one before it.
    corrected = differences.holm({"a": 0.02, "b": 0.001, "c": 0.03, "d": 0.013, "e": np.nan})
    assert [corrected[name] for name in "bdac"] == pytest.approx([0.004, 0.039, 0.04, 0.04])
    assert np.isnan(corrected["e"])
    assert differences.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_probabilities_are_students():
    rng = np.random.default_rng(11)
    loss_PS = rng.normal(4, 0.02, (6, 4)) + rng.normal(0, 0.5, 4)
    by_S = loss_PS[2] - loss_PS[0]
    assert differences.own_p(by_S) == pytest.approx(stats.ttest_rel(loss_PS[2], loss_PS[0]).pvalue)
    # The pooled test is that of a linear model of loss on points and seeds, here by normal equations.
    P, S = loss_PS.shape
    design = np.zeros((P * S, P + S - 1))
    for p in range(P):
        for s in range(S):
            design[p * S + s, p] = 1
            if s:
                design[p * S + s, P + s - 1] = 1
    y, contrast = loss_PS.reshape(-1), np.zeros(P + S - 1)
    contrast[[2, 0]] = 1, -1
    beta, left = np.linalg.lstsq(design, y)[:2]
    freedom = P * S - (P + S - 1)
    error = np.sqrt(contrast @ np.linalg.inv(design.T @ design) @ contrast * left[0] / freedom)
    expected = 2 * stats.t.sf(abs(contrast @ beta) / error, freedom)
    assert differences.pooled_p(loss_PS, by_S) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(differences.own_p(by_S[:1])) and np.isnan(differences.pooled_p(loss_PS[:, :1], by_S[:1]))


def test_a_study_of_noise_finds_something_once_in_twenty(layers):
    """Not once in every study, as it would without the correction."""
    rng, found = np.random.default_rng(2), 0
    for _ in range(200):
        shift = rng.normal(0, 0.1, 3)
        rows = [
            {"point": point.name, "seed": seed, "validation_loss": 4 + shift[seed] + rng.normal(0, 0.01)}
            for point in layers
            for seed in range(3)
        ]
        compared = differences.compare(LAYERS, layers, rows)
        found += any(each.p_pooled < 0.05 for each in compared.comparisons)
    assert 1 <= found <= 20


# --- the findings ---


def test_differences_are_judged_and_shown_beside_the_papers(tmp_path, layers):
    """layer0 is worse by much, layer3 by what only all scatter together shows, the others by nothing."""
    rng, by = np.random.default_rng(4), {"layer0": 0.5, "layer3": 0.05, "moe": 0.0}
    losses = {}
    for point in layers:
        for seed in range(3):
            losses[point.name, seed] = 4 + by.get(point.name, 0) + 0.3 * seed + rng.normal(0, 0.006)
            write(point, seed, tmp_path, losses[point.name, seed])
    found = the(findings_of(LAYERS, layers, 3, tmp_path), Differences)
    of = {each.name: each for each in found.comparisons}
    assert found.baseline == "two" and list(of) == ["layer0", "layer1", "layer2", "layer3", "moe"]
    expected = [losses["layer0", seed] - losses["two", seed] for seed in range(3)]
    assert of["layer0"].by.values == pytest.approx(expected) and of["layer0"].paper == pytest.approx(0.0052, abs=1e-4)
    assert of["layer0"].spread == "more" and of["layer3"].spread == "more if all points scatter alike"
    assert {of[name].spread for name in ("layer1", "layer2", "moe")} == {"within"}
    assert found.found("more") == {"better": [], "worse": ["layer0"]}

    text = write_report(LAYERS, layers, 3, tmp_path)
    assert all(f"- {sentence}" in text for sentence in sentences(found))
    low, high = of["layer0"].by.interval()
    row = [cell.strip() for cell in next(x for x in text.splitlines() if x.startswith("| layer0")).split("|")[1:-1]]
    assert row[:4] == ["layer0", "3", f"{np.mean(expected):+.4f}", f"{low:+.4f} to {high:+.4f}"]
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_that_only_some_points_have_are_used(tmp_path, layers):
    for point in layers[:3]:
        write(point, 0, tmp_path, 4.0)
    write(layers[1], 1, tmp_path, 4.1)  # of no use: the baseline lacks it
    found = findings_of(LAYERS, layers, 2, tmp_path)
    assert the(found, Unfinished) == Unfinished(8, 12)
    compared = the(found, Differences).comparisons
    assert [(each.name, each.by.values, each.spread) for each in compared] == [
        ("layer0", (0.0,), "unknown"),
        ("layer1", (0.0,), "unknown"),
    ]
    only = tmp_path / "only"
    write(layers[1], 0, only, 4.0)
    assert the(findings_of(LAYERS, layers, 1, only), Differences).comparisons == ()


def test_sentences_of_differences():
    clear = Comparison("a", OverSeeds((-0.30, -0.31, -0.32)), 0.001, 0.001, -0.2)
    alike = Comparison("b", OverSeeds((0.02, 0.03)), 0.2, 0.01)
    nothing, one = (
        Comparison("c", OverSeeds((0.02, -0.03)), 0.9, 0.8),
        Comparison("d", OverSeeds((0.1,)), np.nan, np.nan),
    )
    summary, *each = sentences(Differences("two", (clear, alike, nothing, one)))
    assert summary == (
        "4 points are compared with two. More than the spread: a better. If all points scatter alike, also: b worse."
    )
    assert each[0].startswith("a against two: -0.3100 nats per token (seed by seed -0.3000, -0.3100, -0.3200; 95 % ")
    assert each[0].endswith("more than the spread among 4 comparisons (p = 0.001). (The paper: -0.2000.)")
    assert each[1].endswith("if all points scatter alike (p = 0.01; by its own scatter p = 0.2).")
    assert each[2].endswith(
        "not more than the spread among 4 comparisons (p = 0.9; by the scatter of all points p = 0.8)."
    )
    assert each[3].endswith("(seed by seed +0.1000): with one seed its spread is unknown.")
    assert sentences(Differences("two", ())) == [
        "Nothing is compared: no seed has both two and another point finished."
    ]


# --- the picture of a list ---


def drawn(axes):
    """(y, smallest x, largest x) of every line and mark, the axis of 0 left out."""
    lines = [line for line in axes.lines if len(set(line.get_ydata())) == 1]
    return [(line.get_ydata()[0], min(line.get_xdata()), max(line.get_xdata())) for line in lines]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_stay_in_the_frame(tmp_path, layers, seeds):
    """Whole, or cut with an arrow at the edge: two seeds' intervals are six times as wide as five's."""
    rng = np.random.default_rng(21)
    for point in layers:
        for seed in range(seeds):
            write(point, seed, tmp_path, 4 + rng.normal(0, 0.01))
    made = figure(LAYERS, layers, results(layers, seeds, tmp_path))
    check_picture(made)
    axes = made.axes[0]
    low, high = axes.get_xlim()
    assert all(low <= first and last <= high for _, first, last in drawn(axes))
    for y, each in enumerate(the(findings_of(LAYERS, layers, seeds, tmp_path), Differences).comparisons):
        ends = each.by.interval() or each.by.values
        arrows = {line.get_marker() for line in axes.lines if line.get_ydata()[0] == y and len(line.get_ydata()) == 1}
        assert ("<" in arrows) == (ends[0] < low) and (">" in arrows) == (ends[-1] > high)


def test_one_comparison_fills_its_canvas(tmp_path):
    """The height follows the rows, and the numbers stand beside few points."""
    study = STUDIES["pair"]
    points = study.at(study.scales["tiny"]())
    for seed in range(3):
        write(points[0], seed, tmp_path, 4.2 + 0.1 * seed)
        write(points[1], seed, tmp_path, 4.07 + 0.1 * seed + 0.001 * seed)
    made = figure(study, points, results(points, 3, tmp_path))
    check_picture(made)
    width, height = made.get_size_inches()
    assert height < 0.4 * width
    assert [text.get_text() for text in made.axes[0].texts] == ["-0.1290 (-0.1315 to -0.1265)"]


def test_a_far_point_is_written_at_the_edge(tmp_path, layers):
    for point in layers:
        write(point, 0, tmp_path, 4 + {"moe": 0.16, "two": 0}.get(point.name, 0.01))
    made = figure(LAYERS, layers, results(layers, 1, tmp_path))
    check_picture(made)
    assert [text.get_text() for text in made.axes[0].texts] == ["+0.1600 \u2192"] and made.axes[0].get_xlim()[1] < 0.1


# --- what the studies declare ---


def test_one_module_weighs_what_two_do(layers):
    models = {point.name: point.config.model for point in layers}
    assert set(models) == {"two", "layer0", "layer1", "layer2", "layer3", "moe"}
    two = parameters(models["two"])
    for block in range(4):
        one = parameters(models[f"layer{block}"])
        assert models[f"layer{block}"].engram.engram_layer_ids == (block,)
        assert one.groups["engram_projections"] == two.groups["engram_projections"]
        assert one.memory == pytest.approx(two.memory, rel=1e-2)  # fewer heads need fewer distinct primes
    assert models["two"] == engram_tiny().model


def test_ablations_change_one_thing_each(ablations):
    reference = ablations["reference"]
    assert reference.model == engram_tiny().model
    changed = {
        name: {line.split(":")[0] for line in differences_of(config, reference)} for name, config in ablations.items()
    }
    shape = {f"model.engram.engram_{part}" for part in ("n_heads", "head_dim", "vocab_size")}
    assert changed.pop("reference") == set() and changed.pop("moe") >= {"model.moe.n_routed_experts"}
    assert changed == {
        "no_multi_branch": {"model.engram.engram_without"},
        "no_gate": {"model.engram.engram_without"},
        "no_compression": {"model.engram.engram_without"},
        "narrow_hash": {"model.engram.engram_without"},
        "no_convolution": {"model.engram.engram_kernel_size"},
        "across_documents": {"model.engram.engram_cross_documents"},
        "zero_rows": {"model.engram.engram_initializer_range"},
        "lazy_adam": {"optimizer.table_optimizer"},
        "sinkhorn": {"optimizer.table_optimizer"},
        **{f"table_lr_x{by}": {"optimizer.table_lr_multiplier"} for by in (1, 2, 10)},
        **{f"heads{heads}": shape for heads in (1, 2, 8, 16)},
        "orders2": {"model.engram.engram_max_ngram_size", *shape} - {"model.engram.engram_n_heads"},
        "orders234": {"model.engram.engram_max_ngram_size", *shape} - {"model.engram.engram_n_heads"},
    }


def test_reshaped_memories_read_and_hold_as_much(ablations):
    reference = ablations["reference"].model
    for name in ("orders2", "orders234", "heads1", "heads2", "heads8", "heads16"):
        model = ablations[name].model
        assert model.engram.memory_dim == pytest.approx(reference.engram.memory_dim, rel=0.04)
        assert parameters(model).memory == pytest.approx(parameters(reference).memory, rel=0.01)


def test_what_ablations_cannot_start_from():
    study = STUDIES["ablations"]
    base = study.scales["tiny"]()
    for change, (value, message) in {
        "model__engram__engram_max_ngram_size": (4, "leave model.engram.engram_variant"),
        "optimizer__table_lr_multiplier": (2.0, "start from optimizer.table_optimizer"),
        "model__engram__engram_head_dim": (1, r"engram_n_heads=4 of engram_head_dim=1: .* needs 17 or more"),
    }.items():
        with pytest.raises(ConfigError, match=message):
            study.at(replace(base, **{change: value}))


def test_unequal_costs_are_listed():
    study = STUDIES["ablations"]
    points = study.at(study.scales["tiny"]())
    notes = "\n".join(budget_notes(study, points))
    sizes = {point.name: parameters(point.config.model).active for point in points}
    by = 1 - sizes["no_gate"] / sizes["reference"]
    assert f"{by:.2%} fewer active parameters" in notes and "orders" not in notes and "lazy" not in notes


def test_only_what_a_point_declares_may_differ():
    run = engram_tiny()
    points = [Point("a", 0, run), Point("b", 1, replace(run, model__engram__engram_kernel_size=0))]
    prove(points)
    long = replace(run, model__engram__engram_kernel_size=60)
    with pytest.raises(ConfigError, match=r"c has .* parameters and b has"):
        prove([*points, Point("c", 2, long)])
    more = replace(run, model__moe__n_routed_experts=24)
    with pytest.raises(ConfigError, match=r"c has .* total parameters and"):
        prove([*points, Point("c", 2, more, varies=(ACTIVE, FLOPS))])
    prove([*points, Point("c", 2, more, varies=(TOTAL,))])


def test_allocation_has_two_budgets_three_times_apart():
    groups = by_series(ALLOCATION.at(ALLOCATION.scales["tiny"]()))
    assert list(groups) == ["C", "3C"]

    def compute(point):
        run = point.config
        tokens = run.train.steps * run.data.batch_size * run.data.seq_len
        return flops_per_token(run.model, run.data.seq_len) * tokens

    small, large = (group[-1] for group in groups.values())
    assert (small.name, large.name) == ("rho100", "3C-rho100")
    assert compute(large) / compute(small) == pytest.approx(3, rel=0.1)
    assert [point.x for point in groups["3C"]] == pytest.approx([point.x for point in groups["C"]], abs=4)


def test_each_budget_has_its_curve(tmp_path):
    points = ALLOCATION.at(ALLOCATION.scales["tiny"]())
    rng, lowest, height = np.random.default_rng(6), {"C": 65, "3C": 80}, {"C": 4.5, "3C": 4.0}
    for point in points:
        for seed in range(3):
            loss = height[point.series] + 4e-5 * (point.x - lowest[point.series]) ** 2 + rng.normal(0, 0.002)
            write(point, seed, tmp_path, loss)
    found = findings_of(ALLOCATION, points, 3, tmp_path)
    for series, where in lowest.items():
        assert the(found, Valley, series=series).lowest == pytest.approx(where, abs=3)
    moved = the(found, LowestMoved, ours="3C", theirs="C")
    assert moved.is_found and moved.by == pytest.approx(15, abs=4)
    assert the(found, Best, series="3C").difference.theirs == "3C-rho100"
    write_report(ALLOCATION, points, 3, tmp_path)
    assert (tmp_path / "study.png").stat().st_size > 10_000
    # With one budget's runs alone, that one is reported.
    part = findings_of(ALLOCATION, [point for point in points if point.series == "C"], 3, tmp_path)
    assert {type(finding) for finding in part} == {Valley, Best}


def test_sentences_between_curves():
    [moved] = sentences(LowestMoved("3C", "C", "rho", 15.0, 12.0, 18.0))
    assert moved == (
        "3C's lowest point against C's: +15.0 (95 % interval +12.0 to +18.0) on the axis of 'rho': more than the "
        "spread."
    )
    [lacking] = sentences(LowestMoved("3C", "C", "rho", lacks="a lowest point"))
    assert lacking == "3C's lowest point against C's: not compared. That takes a lowest point, for both."
    by = difference_of(np.array([-0.07, -0.08, -0.075]), "A", "B")
    [apart] = sentences(LinesApart(by, "A", "B", 83_716.2, 5.6, ("B",)))
    assert apart.startswith("A's line at x = 83,716 against B's: -0.0750 nats per token")
    assert "B's line has the same loss at 5.60 times the x" in apart and "points of B do not follow a line" in apart
    assert sentences(LinesApart(None, "A", "B")) == ["A and B have no x in common, so their lines are not compared."]


def test_two_lines_are_compared_where_both_have_slots(tmp_path):
    """OverEncoding as good as Engram with half the slots."""
    study, rng = STUDIES["memory_scaling"], np.random.default_rng(14)
    points = study.at(study.scales["tiny"]())
    for point in points:
        for seed in range(3):
            by = 0.05 * np.log10(2) if point.series == "OverEncoding" else 0
            write(point, seed, tmp_path, 5 - 0.05 * np.log10(point.x) + by + 0.2 * seed + rng.normal(0, 1e-4))
    found = findings_of(study, points, 3, tmp_path)
    for series in ("Engram", "OverEncoding"):
        line = the(found, Line, series=series)
        assert line.is_found and line.slope == pytest.approx(-0.05, abs=1e-3)
    apart = the(found, LinesApart)
    assert (apart.ours, apart.theirs, apart.missed) == ("Engram", "OverEncoding", ())
    assert apart.difference.by.mean == pytest.approx(-0.05 * np.log10(2), abs=1e-3)
    assert apart.difference.spread == "more" and apart.times == pytest.approx(2, rel=0.05)
    few = [point for point in points if (point.x > 100_000) is (point.series == "OverEncoding")]
    assert the(findings_of(study, few, 3, tmp_path), LinesApart).difference is None
    for point in points:  # and where OverEncoding follows no line, what is read off it is not said alone
        for seed in range(3 if point.series == "OverEncoding" else 0):
            write(point, seed, tmp_path, 4.9 - 0.02 * np.log10(point.x / 1e4) ** 3 + rng.normal(0, 1e-4))
    assert the(findings_of(study, points, 3, tmp_path), LinesApart).missed == ("OverEncoding",)
    check_picture(figure(study, points, results(points, 3, tmp_path)))


def test_the_offset_of_two_lines_is_read_where_both_are():
    rng, x, z = np.random.default_rng(9), 10.0 ** np.linspace(4, 6, 7), 10.0 ** np.linspace(5, 7, 4)
    shift = rng.normal(0, 0.3, 3)
    ours = 4 - 0.05 * np.log10(x)[:, None] + shift
    theirs = 4.06 - 0.08 * np.log10(z)[:, None] + shift
    middle, by_S = fits.offset(x, ours, z, theirs)
    assert middle == pytest.approx(10**5.5) and by_S == pytest.approx(np.full(3, -0.06 + 0.03 * 5.5))


def test_a_curve_that_the_points_do_not_follow_says_so():
    """Points on a parabola rarely miss it; points with a step at their end do."""
    rng, x = np.random.default_rng(13), np.linspace(40, 100, 7)
    on = 4 + 1e-4 * (x[:, None] - 70) ** 2 + rng.normal(0, 0.2, 3)
    missed = 0
    for _ in range(40):
        curve = fits.fit("valley", x, on + rng.normal(0, 0.01, (7, 3)))
        assert curve
        missed += curve.p_misfit < 0.05
    assert missed <= 6
    step = np.where(x == 100, 0.2, 0)[:, None] + rng.normal(0, 0.005, (7, 3))
    curve = fits.fit("valley", x, step)
    assert curve and not curve.is_followed


# --- some points of a study ---


def test_some_points_are_trained_and_all_are_planned(capsys, tmp_path, monkeypatch):
    trained = []

    def train(config, folder):
        trained.append(folder.name)
        return finish(config, folder)

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "check_corpus", lambda *_: None)
    some = ["layers", "--out", str(tmp_path), "--seeds", "1", "--points"]
    assert command.main([*some, "layer1", "two"]) == 0
    assert trained == ["two-seed0", "layer1-seed0"]
    assert command.main([*some, "two", "moe"]) == 0
    assert trained[2:] == ["moe-seed0"]
    assert len(json.loads((tmp_path / "layers/tiny/plan.json").read_text())["points"]) == 6
    capsys.readouterr()
    for arguments, message in {("layer1",): "add two, which", ("two", "layer9"): "layers has no such point"}.items():
        assert command.main([*some, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_all_studies_with_a_list_have_a_baseline_among_their_points():
    for study in STUDIES.values():
        if study.shape == "differences" and not study.analysis:
            points = study.at(study.scales["tiny"]())
            assert study.baseline in {point.name for point in points}
