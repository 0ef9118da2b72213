"""The verdicts of knock_out, frequency and gates on numbers that were made to decide them; their rows and pictures."""

import json
import math
import re

import numpy as np
import pytest
from pictures import check_picture

from engram_jax.analysis.gates_page import Sentence, contrast_with_black, page
from engram_jax.analysis.groups import Grouping
from engram_jax.analysis.token_classes import CLASSES
from engram_jax.config import ConfigError
from engram_jax.evaluation.over_seeds import OverSeeds
from experiments.studies import STUDIES
from experiments.studies.analyses import raw_numbers, trained_runs
from experiments.studies.analyses.frequency import measure as frequency
from experiments.studies.analyses.frequency import picture as frequency_picture
from experiments.studies.analyses.frequency import report as frequency_report
from experiments.studies.analyses.gates import measure as gates
from experiments.studies.analyses.gates import picture as gates_picture
from experiments.studies.analyses.gates import report as gates_report
from experiments.studies.analyses.knock_out import measure as knock_out
from experiments.studies.analyses.knock_out import picture as knock_out_picture
from experiments.studies.analyses.knock_out import report as knock_out_report
from experiments.studies.analyses.knock_out.measure import OFF, TRAINED, TWIN
from experiments.studies.analyses.trained_runs import DIFFERENCE, Scores
from experiments.studies.engine.declared import FinishedRun

N, SEEDS = 6000, (0, 1, 2)


def as_read_back(rows):
    """Rows as they come from a file."""
    return [json.loads(json.dumps(raw_numbers._without_nan(row))) for row in rows]


# --- knock_out ---


def made_up_scores(rng, cost=0.5, twin=0.1, name_cost=2.0, layers=(0.05, 0.05), seeds=SEEDS):
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
    for seed in seeds:
        base_N = rng.normal(4, 1, N)
        shifts = {TWIN: twin, TRAINED: 0.0, OFF: cost, "layer 1 off": layers[0], "layer 2 off": layers[1]}
        for variant, shift in shifts.items():
            losses_N = base_N + shift + rng.normal(0, 0.05, N) + 0.01 * seed * (variant == OFF)
            if variant == OFF:
                losses_N = losses_N + name_cost * (classes_N == CLASSES.index("name")) + 0.2 * seen_N
            right_N = (rng.random(N) < (0.3 if variant == OFF else 0.6)).astype(float)
            scores.setdefault(variant, []).append(Scores(losses_N, right_N))
    return scores, groupings, rng.integers(0, 30, N)


def measured_knock_out(rng, **changes):
    scores, groupings, document_N = made_up_scores(rng, **changes)
    return knock_out.summarised(changes.get("seeds", SEEDS), scores, groupings, document_N)


def test_knock_outs_verdict(rng):
    scores, groupings, document_N = made_up_scores(rng)
    measured = knock_out.summarised(SEEDS, scores, groupings, document_N)
    found = knock_out_report.verdict(measured)
    off, on, twin = (scores[variant] for variant in (OFF, TRAINED, TWIN))
    assert found.cost.values == pytest.approx([np.mean(a.losses_N - b.losses_N) for a, b in zip(off, on, strict=True)])
    assert found.cost.differs_from() and found.against_twin.differs_from()
    assert found.against_twin.mean == pytest.approx(
        np.mean([np.mean(a.losses_N - b.losses_N) for a, b in zip(off, twin, strict=True)])
    )
    means = [by.mean for by in found.by_kind.values()]
    assert next(iter(found.by_kind)) == "name" and means == sorted(means, reverse=True)
    assert found.not_worse_than_twin == () and found.layers.relation == "hold much of the same"
    assert [round(by.mean, 1) for by in found.by_seen.values()] == pytest.approx(
        [round(found.cost.mean + 0.2 * (i - 2), 1) for i in range(5)], abs=0.11
    )
    kept = 100 * sum(s.right_N.sum() for s in off) / sum(s.right_N.sum() for s in on)
    assert found.retained == pytest.approx(kept, abs=1)


def test_knock_outs_rows_hold_everything_that_is_told(rng):
    scores, groupings, document_N = made_up_scores(rng)
    measured = knock_out.summarised(SEEDS, scores, groupings, document_N)
    rows = list(knock_out_report.rows(measured))
    names = groupings[1].of("name")
    (row,) = (r for r in rows if r.get("group") == "name" and r.get("variant") == OFF and r["seed"] == 1)
    assert row["loss"] == pytest.approx(scores[OFF][1].losses_N[names].mean()) and row["tokens"] == names.sum()
    again = knock_out_report.from_rows(as_read_back(rows))
    assert knock_out_report.report(again) == knock_out_report.report(measured)
    # Older files lack what is retained: it follows from the accuracies, without its standard error.
    older = knock_out_report.from_rows([row for row in as_read_back(rows) if "retained" not in row])
    for label, by in measured.retained.items():
        assert older.retained[label].values == pytest.approx(by.values) and older.retained[label].stderr is None
    assert older.documents is None and knock_out_report.verdict(older).cost == knock_out_report.verdict(measured).cost


@pytest.mark.parametrize(
    ("layers", "relation"),
    [((0.05, 0.05), "hold much of the same"), ((0.5, 0.6), "add up"), ((1.2, 1.3), "need each other")],
)
def test_how_layers_go_together(rng, layers, relation):
    assert knock_out_report.verdict(measured_knock_out(rng, layers=layers)).layers.relation == relation


def test_knock_outs_verdict_where_nothing_is_found(rng):
    scores, groupings, document_N = made_up_scores(rng, cost=0.0, twin=0.0, name_cost=0.0)
    for number, (off, on, twin) in enumerate(zip(*(scores[v] for v in (OFF, TRAINED, TWIN)), strict=True)):
        off.losses_N[:] = on.losses_N + (number - 1) * 0.1  # one seed worse, one better
        twin.losses_N[:] = off.losses_N - (number - 1) * 0.1
    found = knock_out_report.verdict(knock_out.summarised(SEEDS, scores, groupings, document_N))
    assert not found.cost.differs_from() and not found.against_twin.differs_from() and found.layers is None
    assert set(found.not_worse_than_twin) == set(CLASSES[:-1])


def test_sentences_of_knock_out(rng):
    found = knock_out_report.verdict(measured_knock_out(rng))
    lines = knock_out_report.sentences(found, SEEDS)
    assert lines[0].startswith(
        f"Switching the memory off raises the loss by {found.cost.text()} nats per token: more than"
    )
    assert lines[1].startswith(f"Without its memory the model is worse than its twin, by {found.against_twin.text()}")
    assert lines[2].startswith("The memory is worth most on name (")
    assert lines[3] == "The model without its memory is worse than the twin on every kind of token."
    assert lines[4].startswith("After a 3-gram seen 0 times the memory is worth ")
    assert lines[5].startswith("The layers hold much of the same: layer 1 off +0.0")
    assert lines[6].startswith(f"With the memory off, {found.retained:.0f} % as many next tokens are right: from ")
    assert len(lines) == 7


@pytest.mark.parametrize("seeds", [SEEDS, (0,)])
def test_the_picture_of_knock_out(rng, tmp_path, seeds):
    measured = measured_knock_out(rng, seeds=seeds)
    made = knock_out_picture.figure(measured, knock_out_report.paper_retained())
    check_picture(made)
    notes = [axes.get_title(loc="left").splitlines()[-1] for axes in made.axes[:2]]
    assert all(("dots" in note) == (len(seeds) > 1) and "standard error" in note for note in notes)
    knock_out_picture.draw(measured, tmp_path)
    assert (tmp_path / "knock_out.png").stat().st_size > 20_000


def test_the_paper_file_has_figure_6():
    retained = knock_out_report.paper_retained()
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


def test_memorisation_is_found_where_it_is():
    measured = measured_frequency(memorised=0.25)
    found = frequency_report.verdict(measured)
    assert [gain.text for gain in found.gains] == [frequency.HELD_OUT, frequency.UNREAD, frequency.TRAINING]
    held_out = found.gains[0]
    assert (held_out.lower, held_out.higher, held_out.best) == (BUCKETS[1:], (), "64+")
    assert held_out.at_best.mean == pytest.approx(-0.4) and found.gains[2].lower == BUCKETS
    assert [one.other for one in found.memorised] == [frequency.UNREAD, frequency.HELD_OUT]
    for one in found.memorised:
        assert one.by.differs_from() and one.by.mean == pytest.approx(0.25, abs=0.005)
    assert [(trend.layer, trend.rare, trend.frequent) for trend in found.gates] == [
        ("1", "0", "64+"),
        ("2", "0", "64+"),
    ]
    assert found.gates[0].change.mean == pytest.approx(0.2) and found.age.rare == "1-3"


def test_memorisation_is_not_found_where_it_is_not():
    found = frequency_report.verdict(measured_frequency(memorised=0.0))
    assert not any(one.by.differs_from() for one in found.memorised) and len(found.memorised) == 2


def test_sentences_of_frequency():
    lines = frequency_report.sentences(frequency_report.verdict(measured_frequency(0.25)), SEEDS)
    assert lines[0].startswith(
        "On the held-out text memory lowers the loss by more than the spread where the n-gram occurs 1-3, 4-15, 16-63, "
        "64+ times elsewhere. The most: -0.400 ± 0.001 (seeds 0.001) nats per token at 64+ times."
    )
    assert lines[3].startswith(
        "Memory is worth more on the training text than on unread parts of training documents, by"
    )
    assert lines[3].endswith("at equal frequencies: the model with memory memorises more.")
    assert lines[5].startswith(
        "Layer 1's gates are 0.400 after n-grams seen 0 times and 0.600 after those seen 64+ times"
    )
    assert lines[7].startswith("Rows of n-grams seen 1-3 times were updated 8.0 steps ago") and len(lines) == 8
    [nothing] = [
        x
        for x in frequency_report.sentences(frequency_report.verdict(measured_frequency(0)), (0,))
        if "held-out text, " in x
    ]
    assert nothing.startswith("Against the held-out text, memory is not found to memorise more than its twin does: ")


def test_frequencys_rows_are_read_back():
    measured = measured_frequency(memorised=0.25)
    rows = list(frequency_report.rows(measured))
    row = next(r for r in rows if r["text"] == frequency.UNREAD and r["quantity"] == "gate 2")
    assert row["mean"] == pytest.approx(np.mean(list(row["by_seed"].values()))) and list(row["by_seed"]) == [0, 1, 2]
    again = frequency_report.from_rows(as_read_back(rows))
    assert again == measured
    assert frequency_report.report(again) == frequency_report.report(measured)


def test_the_picture_of_frequency(tmp_path):
    measured = measured_frequency(memorised=0.25)
    check_picture(frequency_picture.figure(measured))
    for by_bucket in measured.numbers[frequency.HELD_OUT].values():
        del by_bucket["64+"]  # a bucket that the held-out text lacks is left out
    assert all(one.by.differs_from() for one in frequency_report.verdict(measured).memorised)
    check_picture(frequency_picture.figure(measured))
    assert np.isnan(measured.overall({"64+": OverSeeds((1.0, 2.0, 3.0))}).mean)
    frequency_picture.draw(measured, tmp_path)
    assert (tmp_path / "frequency.png").stat().st_size > 20_000


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


# --- gates ---


def measured_gates(rng):
    def branch(frequency_by, other):
        mean = {gates.MEAN: OverSeeds((0.5, 0.5, 0.5)), gates.SPREAD: OverSeeds((0.2, 0.2, 0.2))}
        return mean | {gates.FREQUENCY: frequency_by, gates.LAYER: other, gates.MEMORY: OverSeeds((math.nan,) * 3)}

    sure, unsure = OverSeeds((0.31, 0.32, 0.33), 0.01), OverSeeds((-0.1, 0.1, 0.02), 0.01)
    correlations = {("1", 0): branch(sure, unsure), ("1", 1): branch(OverSeeds((-0.2, -0.21, -0.2), 0.01), unsure)}
    sentence = Sentence("a < b", ["a", "<b", "\n"], {"1": rng.random((3, 2))}, np.array([0.5, -1.0, np.nan]))
    return gates.Measured(SEEDS, correlations, (sentence,) * 5, "engram-seed0", 1000)


def test_verdict_on_gates(rng, tmp_path):
    measured = measured_gates(rng)
    by_frequency, by_layer, by_memory = gates_report.verdict(measured)
    assert (by_frequency.gates, by_frequency.wider, by_frequency.narrower) == (2, 1, 1)
    assert by_frequency.strongest == ("1", 0) and by_frequency.correlation.mean == pytest.approx(0.32)
    assert (by_layer.wider, by_layer.narrower) == (0, 0)
    assert by_memory.strongest is None and by_memory.correlation is None
    assert len(list(gates_report.rows(measured))) == 10
    lines = gates_report.sentences((by_frequency, by_layer, by_memory), SEEDS)
    assert lines[0] == (
        "With the frequency of the n-gram, 1 of 2 gates open wider and 1 shut, by more than the spread. The strongest "
        "is layer 1, stream 0: rank correlation +0.320 ± 0.010 (seeds 0.010), medium."
    )
    assert lines[2] == "No gate varies, so none goes with what the model saves against its twin."
    assert all(f"- {line}" in gates_report.report(measured) for line in lines)
    gates_picture.draw(measured, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gates.html", "gates.png"}


def test_gates_need_the_runs(tmp_path):
    with pytest.raises(ConfigError, match="--results: gates needs the runs themselves"):
        STUDIES["gates"].analysis.of_rows([{}], tmp_path)


def test_the_page_escapes_and_can_be_read():
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


@pytest.mark.parametrize("name", ["knock_out", "frequency", "depth"])
def test_published_numbers_are_reported_without_their_runs(name, tmp_path):
    """The raw numbers in experiments/results are enough for verdict, tables and pictures."""
    from pathlib import Path

    import experiments

    file = Path(experiments.__file__).parent / "results" / name / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = STUDIES[name].analysis.of_rows(rows, tmp_path)
    assert lines[0] == "## Verdict" and "nan" not in "\n".join(lines)
    assert len(list(tmp_path.glob("*.png"))) >= 1
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == rows


def test_pairs_by_seed(tmp_path):
    runs = [FinishedRun(point, seed, tmp_path / f"{point}{seed}") for seed in (1, 0) for point in ("engram", "moe")]
    assert trained_runs.pairs(runs) == [(s, tmp_path / f"moe{s}", tmp_path / f"engram{s}") for s in (0, 1)]


def test_rows_are_json_without_nan(tmp_path):
    raw_numbers.write_rows(tmp_path / "rows.jsonl", [{"a": math.nan, "b": (1.0, math.inf), "c": {"d": 2}}])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": 2}}
