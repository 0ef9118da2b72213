"""The study `depth`: its verdict on made-up measurements whose answer is known, and the paper's own numbers."""

import json

import numpy as np
import pytest
from pictures import check_picture

from engram_jax.analysis.cka import soft_alignment
from engram_jax.analysis.logit_lens import DIRECTIONS
from engram_jax.analysis.token_classes import CLASSES
from engram_jax.evaluation.statistics import Metric
from experiments.studies.analyses.depth.measure import Likeness, Measured, last_tokens, likenesses, nearest
from experiments.studies.analyses.depth.picture import PAPERS_K, alignment_figure, cka_figure, draw, lens_figure
from experiments.studies.analyses.depth.report import from_rows, paper, report, rows, sentences, sign, verdict
from experiments.studies.trained.pair import ENGRAM, MOE

LAYERS = 12


def made_up(rng, seeds=3, lower=0.0, shift=0.0, spread=0.05):
    """Lenses whose memory model is `lower` nats nearer, and CKA that peaks `shift` layers further on."""

    def lens(by, seed):
        kl = np.append(np.linspace(9, 1, LAYERS) - by + 0.2 * seed + spread * rng.normal(), 0.0)
        return {d: [Metric(float(x), 0.01, 1000, 50) for x in kl] for d in DIRECTIONS}

    def likeness(ours, theirs):
        at = np.arange(LAYERS) + (shift if ours[0] != theirs[0] else 0) + spread * rng.normal()
        cka_AB = np.exp(-((np.arange(LAYERS)[:, None] - at[None]) ** 2) / 4)
        return Likeness(ours[0], ours[1], theirs[0], theirs[1], cka_AB)

    runs = [(point, seed) for seed in range(seeds) for point in (MOE, ENGRAM)]
    pairs = [(a, b) for a in runs for b in runs if a != b and not (a[0] == ENGRAM and b[0] == MOE)]
    lenses = {p: [lens(lower if p == ENGRAM else 0, seed) for seed in range(seeds)] for p in (MOE, ENGRAM)}
    return Measured(tuple(range(seeds)), lenses, tuple(likeness(*pair) for pair in pairs), 500)


def test_nothing_is_found_where_there_is_nothing(rng):
    """Half of the intervals' chance to err, in 24 studies with two questions each."""
    found = 0
    for _ in range(24):
        made = verdict(made_up(rng))
        found += abs(sign(made.convergence[0].by)) + abs(sign(made.alignment.shift))
    assert found <= 12  # 2.4 are expected, and more than 12 have a chance below 1e-5


def test_convergence_and_shift_are_found_in_the_right_direction(rng):
    found = verdict(made_up(rng, lower=1.5, shift=2.0, spread=0.01))
    assert [one.direction for one in found.convergence] == list(DIRECTIONS)
    for one in found.convergence:
        assert sign(one.by) == -1 and one.by.mean == pytest.approx(-1.5, abs=0.1)
        assert one.lower == tuple(range(LAYERS - 1)) and one.higher == () and one.layers == LAYERS - 1
    assert sign(found.alignment.shift) == 1
    assert 1 < found.alignment.shift.mean <= 2.2  # the last layers cannot be shifted by 2
    found = verdict(made_up(rng, lower=-1.5, shift=-2.0, spread=0.01))
    assert sign(found.convergence[0].by) == 1 and sign(found.alignment.shift) == -1


def test_sentences_of_depth(rng):
    lines = sentences(verdict(made_up(rng, lower=1.5, shift=2.0, spread=0.01)))
    for direction, line in zip(DIRECTIONS, lines, strict=False):
        assert line.startswith(
            f"KL({direction}), mean over layers 0 to 10: converges earlier with memory. engram against"
        )
        assert line.endswith("lower in 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10; higher in none.")
    assert lines[2].startswith("Alignment as the paper reads it, without a control")
    assert lines[3].startswith("Alignment beyond the control: towards deeper layers. +")
    assert lines[-1].startswith("CKA of equal layers: ")
    one_seed = sentences(verdict(made_up(rng, seeds=1, lower=3)))
    assert "one seed alone shows nothing" in one_seed[0] and "one seed: its spread is unknown" in one_seed[0]
    assert one_seed[2] == "Alignment: with one seed there is no other run of the baseline to compare with."


def test_alignment_compares_runs_of_different_seeds_only(rng):
    measured = made_up(rng, seeds=2)
    twins = [x for x in measured.likenesses if x.rows_seed == x.columns_seed]
    assert len(twins) == 2
    for x in twins:
        x.cka_AB[:] = np.nan  # would be seen
    assert len(measured.between(MOE, MOE)) == len(measured.between(MOE, ENGRAM)) == 2
    by_columns = {x.columns_seed: x.alignment_B for x in measured.between(MOE, ENGRAM)}
    np.testing.assert_array_equal(measured.alignment(MOE, ENGRAM), [by_columns[0], by_columns[1]])


def test_with_three_seeds_a_run_has_two_references(rng):
    measured = made_up(rng)
    ours = [x.alignment_B for x in measured.likenesses if (x.rows, x.columns, x.columns_seed) == (MOE, ENGRAM, 1)]
    seeds = [x.rows_seed for x in measured.likenesses if (x.rows, x.columns, x.columns_seed) == (MOE, ENGRAM, 1)]
    assert sorted(seeds) == [0, 1, 2]
    expected = np.mean([x for x, seed in zip(ours, seeds, strict=True) if seed != 1], axis=0)
    np.testing.assert_allclose(measured.alignment(MOE, ENGRAM)[1], expected)


def test_one_seed_has_no_control(tmp_path, rng):
    measured = made_up(rng, seeds=1, lower=3)
    found = verdict(measured)
    assert found.alignment is None and {sign(one.by) for one in found.convergence} == {0}
    assert "With one seed there is no control: train two or more." in report(measured)
    draw(measured, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lens.png"]
    made = lens_figure(measured, paper())
    check_picture(made)
    assert "dots" not in made.get_suptitle()


def test_report_rows_and_pictures_hold_what_was_measured(tmp_path, rng):
    measured = made_up(rng, lower=0.5)
    lines = report(measured)
    start = lines.index(f"KL({DIRECTIONS[1]})") + 4
    moe_SL, engram_SL = (measured.divergence(point, DIRECTIONS[1]) for point in (MOE, ENGRAM))
    for layer in range(LAYERS):
        cells = lines[start + layer].split("|")[1:-1]
        assert int(cells[0]) == layer - 1
        expected = [x.mean(0)[layer] for x in (moe_SL, engram_SL, engram_SL - moe_SL)]
        np.testing.assert_allclose([float(cell) for cell in cells[1:4]], expected, atol=6e-4)
    assert lines[start + LAYERS] == ""  # the last layer is 0 by definition
    listed = [json.loads(json.dumps(row)) for row in rows(measured)]
    kinds = [row["measure"] for row in listed]
    assert kinds.count("lens") == 2 * 3 * 2 * (LAYERS + 1) and kinds.count("cka") == 6 + 9 + 6
    assert {row["k"] for row in listed if row["measure"] == "cka"} == {2}
    again = from_rows(listed)
    assert report(again) == lines and verdict(again) == verdict(measured)
    draw(measured, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignment.png", "cka.png", "lens.png"]
    for figure in (lens_figure, cka_figure, alignment_figure):
        check_picture(figure(measured, paper()))


def test_likenesses_are_of_every_two_runs_that_the_report_asks_for(rng):
    states = {(point, seed): rng.normal(size=(2, 30, 3)) for seed in (0, 1) for point in (MOE, ENGRAM)}
    states[ENGRAM, 1] = 2 * states[MOE, 0]
    found = {(x.rows, x.rows_seed, x.columns, x.columns_seed): x.cka_AB for x in likenesses(states)}
    assert len(found) == 2 + 4 + 2
    np.testing.assert_allclose(np.diag(found[MOE, 0, ENGRAM, 1]), 1)
    assert np.diag(found[MOE, 1, ENGRAM, 1]).max() < 0.9


def test_soft_alignment_gives_the_papers_line_from_its_heat_maps():
    """Read off the figure's colours, so near-ties among the five nearest may fall the other way in one layer."""
    figures = paper()
    for name in ("Engram-27B", "Engram-40B"):
        ours, plotted = soft_alignment(np.array(figures["cka"][name]), PAPERS_K), np.array(figures["alignment"][name])
        assert len(plotted) == 30 and np.median(np.abs(ours - plotted)) < 0.02
        assert np.abs(ours - plotted).max() < 1
    assert [len(curve) for curve in figures["divergence"].values()] == [29] * 3
    assert [nearest(layers) for layers in (30, 12, 4)] == [PAPERS_K, 2, 2]


def test_names_end_where_the_next_token_does_not_continue_them():
    words = [
        *(("space", False), ("name", False), ("name", True), ("name", True), ("punctuation", False)),  # ends at 3
        *(("identifier", False), ("identifier", False), ("identifier", True), ("word", False), ("word", True)),  # at 7
        *(("number", False), ("number", True), ("identifier", True)),  # goes on, for all that is known
    ]
    classes = np.array([CLASSES.index(name) for name, _ in words])
    np.testing.assert_array_equal(last_tokens(classes, np.array([on for _, on in words])), [3, 7])
