"""What the reports of knock_out, frequency and gates say of numbers that were made to say it."""

import json
import math
import re

import numpy as np
import pytest

from engram_jax.analysis.gates_page import Sentence, contrast_with_black, page
from engram_jax.analysis.groups import Grouping, OverSeeds
from engram_jax.analysis.token_classes import CLASSES
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.frequency import measure as frequency
from experiments.studies.analyses.gates import measure as gates
from experiments.studies.analyses.knock_out import measure as knock_out
from experiments.studies.analyses.knock_out.picture import draw as draw_knock_out
from experiments.studies.analyses.trained_runs import DIFFERENCE, OFF, TRAINED, TWIN, Scores
from experiments.studies.engine.declared import FinishedRun

N, SEEDS = 6000, (0, 1, 2)


@pytest.fixture
def rng():
    return np.random.default_rng()


def said(lines):
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


# --- knock_out ---


def measured_knock_out(rng, cost=0.5, twin=0.1, name_cost=2.0, layers=(0.05, 0.05)):
    """Losses that differ by these numbers, with noise by token and by seed; `name` by more than the other kinds."""
    classes_N = rng.integers(0, len(CLASSES) - 1, N)
    seen_N = rng.integers(0, 5, N)
    groupings = (
        Grouping("all tokens", ("all",), np.zeros(N, np.int64)),
        Grouping("kind", CLASSES, classes_N),
        Grouping("place in the word", ("begins a word", "continues a word"), rng.integers(-1, 2, N)),
        Grouping("n-gram in training", tuple(f"3-gram seen {i} times" for i in range(5)), seen_N),
    )
    scores = {}
    for seed in SEEDS:
        base_N = rng.normal(4, 1, N)
        shifts = {TWIN: twin, TRAINED: 0.0, OFF: cost, "layer 1 off": layers[0], "layer 2 off": layers[1]}
        for variant, shift in shifts.items():
            losses_N = base_N + shift + rng.normal(0, 0.05, N) + 0.01 * seed * (variant == OFF)
            if variant == OFF:
                losses_N = losses_N + name_cost * (classes_N == CLASSES.index("name")) + 0.2 * seen_N
            right_N = (rng.random(N) < (0.3 if variant == OFF else 0.6)).astype(float)
            scores.setdefault(variant, []).append(Scores(losses_N, right_N))
    return knock_out.Measured(SEEDS, rng.integers(0, 30, N), groupings, scores)


def test_knock_outs_verdict_and_table(rng, tmp_path):
    measured = measured_knock_out(rng)
    sentences = said(knock_out.report(measured))
    off, on = (measured.scores[variant] for variant in (OFF, TRAINED))
    by_seed = [np.mean(a.losses_N - b.losses_N) for a, b in zip(off, on, strict=True)]
    assert f"the loss is {np.mean(by_seed):+.3f} ± " in sentences[0] and "spread explains" not in sentences[0]
    assert f"(seeds {np.std(by_seed, ddof=1):.3f})" in sentences[0]
    assert "worse than the twin" in sentences[1]
    assert sentences[2].startswith("Most is lost on name (")
    assert "worse on every kind of token" in sentences[3]
    assert "hold much of the same: layer 1 off +0.0" in sentences[5]
    kept = 100 * sum(s.right_N.sum() for s in off) / sum(s.right_N.sum() for s in on)
    assert abs(float(re.search(r"(\d+) % of the next tokens", sentences[6])[1]) - kept) < 1
    rows = list(knock_out.rows(measured))
    names = measured.groupings[1].of("name")
    (row,) = (r for r in rows if r.get("group") == "name" and r.get("variant") == OFF and r["seed"] == 1)
    assert row["loss"] == pytest.approx(off[1].losses_N[names].mean()) and row["tokens"] == names.sum()
    draw_knock_out(measured, knock_out.paper()["retained"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


@pytest.mark.parametrize(("layers", "relation"), [((0.5, 0.6), "add up"), ((1.2, 1.3), "need each other")])
def test_how_layers_go_together(rng, layers, relation):
    (sentence,) = (s for s in said(knock_out.report(measured_knock_out(rng, layers=layers))) if "The layers" in s)
    assert relation in sentence


def test_knock_outs_verdict_where_nothing_is_found(rng):
    measured = measured_knock_out(rng, cost=0.0, twin=0.0, name_cost=0.0)
    for number, (off, on, twin) in enumerate(zip(*(measured.scores[v] for v in (OFF, TRAINED, TWIN)), strict=True)):
        off.losses_N[:] = on.losses_N + (number - 1) * 0.1  # one seed worse, one better
        twin.losses_N[:] = off.losses_N - (number - 1) * 0.1
    sentences = said(knock_out.report(measured))
    assert "which the spread explains." in sentences[0]
    assert "as good as its twin, within the spread" in sentences[1]
    assert "is not shown to be worse on keyword, " in sentences[3]
    assert not any("The layers" in sentence for sentence in sentences)


def test_the_paper_file_has_figure_6():
    retained = knock_out.paper()["retained"]
    assert len(retained) == 20 and min(retained, key=retained.get) == "TriviaQA" and retained["C3"] == 93.63


# --- frequency ---

BUCKETS = ("0", "1-3", "4-15", "16-63", "64+")


def measured_frequency(memorised):
    """Memory gains 0.1 a bucket on held-out text, and `memorised` more on the training text."""

    def numbers(value):
        return OverSeeds(tuple(value + 0.001 * (seed - 1) for seed in SEEDS), 0.001)

    def text(extra):
        moe = {label: numbers(4 - 0.3 * i) for i, label in enumerate(BUCKETS)}
        by = {label: numbers(-0.1 * i - extra) for i, label in enumerate(BUCKETS)}
        values = {
            "moe": moe,
            "engram": {label: OverSeeds(tuple(np.add(moe[label].values, by[label].values))) for label in BUCKETS},
            DIFFERENCE: by,
            "share": {label: OverSeeds((0.2,) * 3) for label in BUCKETS},
        }
        for layer in ("1", "2"):
            values[f"gate {layer}"] = {label: numbers(0.4 + 0.05 * i) for i, label in enumerate(BUCKETS)}
            values[f"uses {layer}"] = {label: numbers(10.0 * i) for i, label in enumerate(BUCKETS)}
            # Never seen, so never updated in this table of rows without collisions.
            values[f"age {layer}"] = {label: numbers(9.0 - i) for i, label in enumerate(BUCKETS) if i}
        return values

    texts = {frequency.TRAINING: text(memorised), frequency.UNREAD: text(0.0), frequency.HELD_OUT: text(0.0)}
    return frequency.Measured(SEEDS, ("1", "2"), 3, texts)


def test_memorisation_is_found_where_it_is(tmp_path):
    measured = measured_frequency(memorised=0.25)
    lines = frequency.report(measured)
    sentences = said(lines)
    assert "held-out text memory gains beyond the spread where the n-gram occurs 1-3, 4-15, 16-63, 64+" in sentences[0]
    assert "most at 64+ (-0.4" in sentences[0]
    assert sum("it memorises more than its twin does" in sentence for sentence in sentences) == 2
    by = measured.overall(measured.gap(DIFFERENCE, frequency.UNREAD))
    assert by.mean == pytest.approx(0.25, abs=0.005)
    assert any(f"than on {frequency.UNREAD}, by {by.text()} nats" in sentence for sentence in sentences)
    frequency.draw(measured, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000
    rows = list(frequency.rows(measured))
    row = next(r for r in rows if r["text"] == frequency.UNREAD and r["quantity"] == "gate 2")
    assert row["mean"] == pytest.approx(np.mean(list(row["by_seed"].values()))) and list(row["by_seed"]) == [0, 1, 2]


def test_memorisation_is_not_found_where_it_is_not():
    sentences = said(frequency.report(measured_frequency(memorised=0.0)))
    assert sum("No memorisation beyond the twin's" in sentence for sentence in sentences) == 2


def test_shares_are_the_held_out_texts():
    measured = measured_frequency(0.0)
    for share, label in zip((0.5, 0.1, 0.2, 0.1, 0.1), BUCKETS, strict=True):
        measured.numbers[frequency.HELD_OUT]["share"][label] = OverSeeds((share,) * 3)
    by = {label: OverSeeds((float(i), 1.0, 2.0), 0.1 * i) for i, label in enumerate(BUCKETS)}
    overall = measured.overall(by)
    assert overall.values == pytest.approx((0.1 + 0.4 + 0.3 + 0.4, 1.0, 2.0))
    assert overall.stderr == pytest.approx(0.01 + 0.04 + 0.03 + 0.04)
    del by["64+"]  # of what is left
    assert measured.overall(by).values[0] == pytest.approx((0.1 + 0.4 + 0.3) / 0.9)


def test_a_bucket_that_the_held_out_text_lacks_is_left_out(tmp_path):
    measured = measured_frequency(memorised=0.25)
    for by_bucket in measured.numbers[frequency.HELD_OUT].values():
        del by_bucket["64+"]
    assert sum("it memorises more than its twin does" in sentence for sentence in said(frequency.report(measured))) == 2
    frequency.draw(measured, tmp_path / "picture.png")
    assert np.isnan(measured.overall({"64+": OverSeeds((1.0, 2.0, 3.0))}).mean)


# --- gates ---


def test_gates_report(rng):
    def branch(frequency_by, other):
        mean = {gates.MEAN: OverSeeds((0.5, 0.5, 0.5)), gates.SPREAD: OverSeeds((0.2, 0.2, 0.2))}
        return mean | {gates.FREQUENCY: frequency_by, gates.LAYER: other, gates.MEMORY: OverSeeds((math.nan,) * 3)}

    sure, unsure = OverSeeds((0.31, 0.32, 0.33), 0.01), OverSeeds((-0.1, 0.1, 0.02), 0.01)
    correlations = {("1", 0): branch(sure, unsure), ("1", 1): branch(OverSeeds((-0.2, -0.21, -0.2), 0.01), unsure)}
    sentence = Sentence("a < b", ["a", "<b", "\n"], {"1": rng.random((3, 2))}, np.array([0.5, -1.0, np.nan]))
    measured = gates.Measured(SEEDS, correlations, (sentence,) * 5, "engram-seed0", 1000)
    sentences = said(gates.report(measured))
    assert sentences[0].startswith("1 of 2 gates open wider with the frequency of the n-gram, 1 shut")
    assert "layer 1, stream 0: rank correlation +0.320 ± 0.010 (seeds 0.010), medium" in sentences[0]
    assert sentences[1].startswith("0 of 2 gates open wider with what their layer saves on the next token, 0 shut")
    assert sentences[2] == "No gate varies, so none goes with what the model saves against its twin."
    assert len(list(gates.rows(measured))) == 10


def test_the_page_escapes_and_can_be_read(rng):
    gate_TM = np.array([[0.0], [0.5], [1.0]])
    html = page("<gates>", ["a & b"], [Sentence("x < y", ["<s>", " x", "\n"], {"1": gate_TM}, np.zeros(3))])
    assert "<s>" not in html and "&lt;s&gt;" in html and "a &amp; b" in html and "·x" in html
    cells = re.findall(r'background:(#\w{6});color:(#\w{3})">([\d.]+)', html)
    assert [gate for *_, gate in cells] == ["0.00", "0.50", "1.00"]
    for background, ink, _ in cells:
        rgb = tuple(int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
        contrast = contrast_with_black(rgb) if ink == "#000" else 21 / contrast_with_black(rgb)
        assert contrast >= 4.5, "WCAG's level AA"
    assert contrast_with_black((1.0, 1.0, 1.0)) == pytest.approx(21) and contrast_with_black((0, 0, 0)) == 1


# --- shared ---


def test_pairs_by_seed(tmp_path):
    runs = [FinishedRun(point, seed, tmp_path / f"{point}{seed}") for seed in (1, 0) for point in ("engram", "moe")]
    assert trained_runs.pairs(runs) == [(s, tmp_path / f"moe{s}", tmp_path / f"engram{s}") for s in (0, 1)]


def test_rows_are_json_without_nan(tmp_path):
    trained_runs.write_rows(tmp_path / "rows.jsonl", [{"a": math.nan, "b": (1.0, math.inf), "c": {"d": 2}}])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": 2}}
