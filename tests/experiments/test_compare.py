"""Comparisons of made-up runs whose every number is known."""

import errno
import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from pictures import check_picture

from engram_jax.commands.compare import main
from engram_jax.comparison.picture import comparison_figure, smoothed
from engram_jax.comparison.report import compared_pairs, report
from engram_jax.comparison.run_groups import BITS, LOSS, Mismatch, Run, grouped
from engram_jax.comparison.verdict import Verdict, headline, sentence, verdict
from engram_jax.config import RunConfig, replace, to_dict
from engram_jax.counts import parameters
from engram_jax.data.ngram_frequency import bucket_names
from engram_jax.errors import FAILED, MISTAKEN
from engram_jax.evaluation.over_seeds import student_interval
from engram_jax.pictures import STYLES
from experiments.runs.sizes import engram_tiny, moe_tiny

MOE = replace(moe_tiny(), name="moe_tiny", train__steps=300)
ENGRAM = replace(engram_tiny(), name="engram_tiny", train__steps=300)
SHARES = [0.3, 0.2, 0.15, 0.25, 0.1]


def write_run(path, config: RunConfig, loss: float, *, finished=True, tokenizer="{}", **result):
    """A run of 100-step lines that ends at `loss`; bucket i's loss is `loss - i / 2`."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    (path / "tokenizer.json").write_text(tokenizer)
    lines = [
        {"step": step, "loss": loss + 30 / step, "tokens_per_second": 1000.0 + step}
        for step in ((10, 100, 200, 300) if finished else (10, 100))
    ]
    lines.append({"step": lines[-1]["step"], "validation_loss": loss, "bits_per_byte": loss / 2})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        buckets = {
            name: {"loss": loss - i / 2, "share": share}
            for i, (name, share) in enumerate(zip(bucket_names(), SHARES, strict=True))
        }
        summary = {"name": config.name, "step": 300, "loss": loss, "bits_per_byte": loss / 2, "num_tokens": 5000}
        (path / "result.json").write_text(json.dumps(summary | {"buckets": buckets} | result))
    return path


def groups_of(*run_dirs):
    return grouped([Run.load(path) for path in run_dirs])


def compared(*run_dirs) -> str:
    """The report's text."""
    return report(groups_of(*run_dirs))


def verdicts(*run_dirs) -> list[Verdict]:
    return [verdict(*pair) for pair in compared_pairs(groups_of(*run_dirs))]


def row(table: str, head: str) -> list[str]:
    """The cells of the line that begins with `head`."""
    [line] = [line for line in table.splitlines() if line.startswith(f"| {head} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def refused(capsys, *arguments, status=MISTAKEN) -> str:
    assert main([*map(str, arguments)]) == status
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    return streams.err


def seed(config, train, data=0):
    return replace(config, train__seed=train, data__seed=data)


def test_two_runs(tmp_path):
    a, b = write_run(tmp_path / "a", MOE, 3.5), write_run(tmp_path / "b", ENGRAM, 3.25)
    [found] = verdicts(a, b)
    assert (found.ours, found.theirs, found.metric, found.mismatch) == ("engram_tiny", "moe_tiny", LOSS, None)
    assert (found.our_mean, found.their_mean, found.difference) == (3.25, 3.5, -0.25)
    assert found.spread == "unknown" and found.by_seed == {"0": -0.25}
    table = compared(a, b)
    assert f"- {sentence(found)}" in table and "±" not in table
    for config, column in ((MOE, 0), (ENGRAM, 1)):
        counts = parameters(config.model)
        for head, count in (("parameters", counts.total), ("active per token", counts.active)):
            assert row(table, head)[column] == f"{count:,}"
        assert row(table, "in memory tables")[column] == f"{counts.memory:,}"
    assert row(table, "steps") == ["300", "300"] and row(table, "tokens") == ["1,228,800"] * 2
    assert row(table, "validation loss") == ["3.5000", "3.2500 (-0.2500)"]
    assert row(table, "bits per byte") == ["1.7500", "1.6250 (-0.1250)"]
    assert row(table, "tokens/s (median)") == ["1,150", "1,150"]
    for i, (name, share) in enumerate(zip(bucket_names(), SHARES, strict=True)):
        tail = f"{share:.1%} of tokens"
        ours, theirs = 3.25 - i / 2, 3.5 - i / 2
        assert row(table, f"{name} times") == [f"{theirs:.4f}, {tail}", f"{ours:.4f} (-0.2500), {tail}"]
    assert "`model.moe.n_routed_experts: 20 here, 24 there`" in table


def test_the_order_of_the_runs_decides_the_baseline(tmp_path):
    a, b = write_run(tmp_path / "a", MOE, 3.5), write_run(tmp_path / "b", ENGRAM, 3.25)
    [found] = verdicts(b, a)
    assert (found.ours, found.theirs, found.difference) == ("moe_tiny", "engram_tiny", 0.25)


def test_seeds_are_grouped(tmp_path, rng):
    losses = {"moe": rng.uniform(3.5, 3.6, 3), "engram": rng.uniform(3.2, 3.3, 3)}
    runs = [
        write_run(tmp_path / f"{name}{i}", seed(config, i), loss)
        for i in range(3)
        for name, config, loss in (("moe", MOE, losses["moe"][i]), ("engram", ENGRAM, losses["engram"][i]))
    ]
    table = compared(*runs)
    assert row(table, "seeds") == ["0, 1, 2", "0, 1, 2"]
    [moe, engram] = row(table, "validation loss")[:2]
    for cell, values in ((moe, losses["moe"]), (engram, losses["engram"])):
        mean, std, low, high = map(float, re.match(r"(\S+) ± (\S+) \[(\S+), (\S+)\]", cell).groups())
        expected = statistics.mean(values), statistics.stdev(values), min(values), max(values)
        assert [mean, std, low, high] == pytest.approx(expected, abs=6e-5)
    assert "Over seeds: mean ± standard deviation [lowest, highest] (minus the baseline's mean)." in table
    [found] = verdicts(*runs)
    by_S = losses["engram"] - losses["moe"]
    assert list(found.by_seed) == ["0", "1", "2"] and found.paired.values == pytest.approx(by_S)
    assert found.paired.interval() == pytest.approx(student_interval(by_S))
    assert found.spread == ("more" if student_interval(by_S)[1] < 0 else "within")


def test_a_difference_is_held_against_the_spread_of_its_pairs(tmp_path):
    """What a seed does to both runs is no doubt about their difference; what it does to one of them is."""
    moe = [write_run(tmp_path / f"m{i}", seed(MOE, i), 3.5 + 0.1 * i) for i in range(3)]
    alike = [write_run(tmp_path / f"a{i}", seed(ENGRAM, i), 3.42 + 0.1 * i + 0.001 * i) for i in range(3)]
    [found] = verdicts(*moe, *alike)
    assert found.difference == pytest.approx(-0.079) and found.spread == "more"
    apart = [write_run(tmp_path / f"e{i}", seed(ENGRAM, i), 3.42 + 0.1 * (2 - i)) for i in range(3)]
    [found] = verdicts(*moe, *apart)
    assert found.difference == pytest.approx(-0.08) and found.spread == "within"
    other = [write_run(tmp_path / f"o{i}", seed(ENGRAM, 5 + i), 3.0) for i in range(3)]
    [found] = verdicts(*moe, *other)
    assert found.spread == "unknown" and found.by_seed == {} and found.paired is None


def test_sentences_of_a_verdict():
    found = Verdict("a", "b", LOSS, None, 3.2, 3.5, {"0": -0.29, "1": -0.30, "2 (data 7)": -0.31})
    assert headline(found) == "a is 0.3000 nats per token below b (3.2000 against 3.5000)"
    assert sentence(found) == (
        "a is 0.3000 nats per token below b (3.2000 against 3.5000). Seed by seed: -0.2900 (seed 0), -0.3000 (seed 1), "
        "-0.3100 (seed 2 (data 7)); mean -0.3000, 95 % interval -0.3248 to -0.2752. That is more than the spread over "
        "seeds."
    )
    within = Verdict("a", "b", LOSS, None, 3.2, 3.2, {"0": -0.29, "1": 0.30})
    assert sentence(within).endswith("That is NOT more than the spread over seeds.")
    one = Verdict("a", "b", BITS, Mismatch("tokenizer"), 1.2, 1.1, {"0": 0.1})
    assert sentence(one) == (
        "WARNING: a and b have different tokenizers. Nats per token are not comparable; bits per byte of equal text "
        "are. a is 0.1000 bits per byte above b (1.2000 against 1.1000). The spread over seeds is unknown: that takes "
        "two seeds or more that both have."
    )
    for mismatch, said in (
        (
            Mismatch("text", ("data.corpus",)),
            "a and b read different text (data.corpus), so their losses are not comparable.",
        ),
        (
            Mismatch("tokens", ("4,000", "5,000")),
            "a and b were evaluated on 4,000 and 5,000 tokens, so their losses are not",
        ),
    ):
        refused = Verdict("a", "b", None, mismatch)
        assert sentence(refused).startswith(f"WARNING: {said}") and headline(refused) == "a and b are not comparable"


def test_the_data_seed_makes_another_run_too(tmp_path):
    runs = [write_run(tmp_path / f"r{i}", seed(MOE, 0, data), 3.5) for i, data in enumerate((0, 7))]
    assert row(compared(*runs), "seeds") == ["0, 0 (data 7)"]


def test_runs_of_one_name_with_other_settings_stay_apart(tmp_path):
    a = write_run(tmp_path / "a", MOE, 3.5)
    b = write_run(tmp_path / "b", replace(MOE, optimizer__learning_rate=1e-3), 3.6)
    [found] = verdicts(a, b)
    assert (found.ours, found.theirs) == (f"moe_tiny [{b}]", f"moe_tiny [{a}]")
    assert found.difference == pytest.approx(0.1)
    table = compared(a, b)
    assert "`optimizer.learning_rate: 0.001 here, 0.003 there`" in table


def test_an_unfinished_run_is_shown_and_not_compared(tmp_path):
    a, b = write_run(tmp_path / "a", ENGRAM, 3.0, finished=False), write_run(tmp_path / "b", MOE, 3.5)
    table = compared(a, b)
    assert "engram_tiny (unfinished, step 100 of 300)" in table and verdicts(a, b) == []
    assert "- Nothing to compare: fewer than two finished groups." in table
    assert row(table, "validation loss") == ["3.0000", "3.5000"] and row(table, "steps") == ["100", "300"]
    assert row(table, "0 times") == ["3.5000, 30.0% of tokens"]
    c = write_run(tmp_path / "c", seed(MOE, 1), 3.7)
    assert row(compared(a, b, c), "validation loss")[1].startswith("3.6000 ± ")


def test_an_unfinished_run_alone(tmp_path):
    a = write_run(tmp_path / "a", MOE, 3.5, finished=False)
    (a / "metrics.jsonl").write_text('{"step": 1, "loss": 8.0, "tokens_per_second": 100.0}\n{"step": 5, "lo')
    table = compared(a)
    assert "moe_tiny (unfinished, step 1 of 300)" in table and row(table, "validation loss") == ["-"]


def test_another_tokenizer_leaves_bits_per_byte(tmp_path):
    a, b = write_run(tmp_path / "a", MOE, 3.5), write_run(tmp_path / "b", ENGRAM, 3.25, tokenizer='{"other": 1}')
    table = compared(a, b)
    [found] = verdicts(a, b)
    assert found.metric == BITS and found.mismatch == Mismatch("tokenizer") and found.difference == -0.125
    assert row(table, "validation loss")[1] == "3.2500" and row(table, "bits per byte")[1] == "1.6250 (-0.1250)"
    assert "(-" not in row(table, "0 times")[1]


@pytest.mark.parametrize(
    ("changes", "result", "mismatch"),
    [
        ({"data__corpus": "elsewhere"}, {}, Mismatch("text", ("data.corpus",))),
        ({"data__holdout_fraction": 0.1}, {}, Mismatch("text", ("data.holdout_fraction",))),
        ({}, {"corpus_sha256": "b"}, Mismatch("text", ("corpus_sha256",))),
        ({}, {"num_tokens": 4000}, Mismatch("tokens", ("4,000", "5,000"))),
    ],
)
def test_losses_on_other_text_are_not_compared(tmp_path, changes, result, mismatch):
    a = write_run(tmp_path / "a", MOE, 3.5, corpus_sha256="a" if "corpus_sha256" in result else None)
    b = write_run(tmp_path / "b", replace(ENGRAM, **changes), 3.25, **result)
    table = compared(a, b)
    [found] = verdicts(a, b)
    assert found.metric is None and found.mismatch == mismatch and f"- {sentence(found)}" in table
    assert row(table, "validation loss")[1] == "3.2500" and row(table, "bits per byte")[1] == "1.6250"


def test_the_same_documents_by_another_path_are_compared(tmp_path):
    a = write_run(tmp_path / "a", replace(MOE, data__corpus="here"), 3.5, corpus_sha256="a")
    b = write_run(tmp_path / "b", replace(ENGRAM, data__corpus="there"), 3.25, corpus_sha256="a")
    [found] = verdicts(a, b)
    assert found.metric == LOSS and found.difference == -0.25


def test_buckets_of_another_ngram_order_are_not_compared(tmp_path):
    a = write_run(tmp_path / "a", MOE, 3.5)
    b = write_run(tmp_path / "b", ENGRAM, 3.25, buckets={"0": {"loss": 4.0, "share": 0.6}})
    table = compared(a, b)
    assert row(table, "0 times")[1] == "4.0000, 60.0% of tokens" and row(table, "64+ times")[1] == "-"
    assert row(table, "validation loss")[1] == "3.2500 (-0.2500)"


def picture(folder) -> np.ndarray:
    pixels = imread(folder / "compare.png")[..., :3]
    assert pixels.shape[0] >= 900 and pixels.shape[1] >= 1200
    return pixels


def share_of(pixels: np.ndarray, color: str) -> float:
    """Share of the pixels in this colour, also where it is drawn three quarters opaque on white."""
    solid = np.array(to_rgb(color))
    shades = (solid, 0.75 * solid + 0.25)
    return float(np.mean([np.all(np.abs(pixels - shade) < 0.02, axis=-1) for shade in shades]))


def test_picture_and_table_are_written_beside_the_first_run(capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    runs = [write_run(tmp_path / "runs" / f"m{i}", seed(MOE, i), 3.5) for i in range(2)]
    runs += [write_run(tmp_path / f"e{i}", seed(ENGRAM, i), 3.25 + i / 100) for i in range(2)]
    assert main([*map(str, runs)]) == 0
    folder, printed = tmp_path / "runs", capsys.readouterr().out
    table = (folder / "compare.md").read_text(encoding="utf-8")
    assert table == compared(*runs) and table in printed and str(folder / "compare.png") in printed
    pixels = picture(folder)
    assert share_of(pixels, STYLES[1][0]) > 0.01, "the bars of the differences are missing"
    assert 0 < share_of(pixels, STYLES[0][0]) < 0.1 and share_of(pixels, STYLES[2][0]) == 0


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_picture_speaks_of_seeds_where_there_are_some(tmp_path, seeds):
    runs = [write_run(tmp_path / f"m{i}", seed(MOE, i), 3.5 + 0.01 * i) for i in range(seeds)]
    runs += [write_run(tmp_path / f"e{i}", seed(ENGRAM, i), 3.25) for i in range(seeds)]
    made = comparison_figure(groups_of(*runs), headline(verdicts(*runs)[0]))
    check_picture(made)
    [title] = [axes.get_title() for axes in made.axes if axes.get_title().startswith("Difference")]
    dots = [line for line in made.axes[-1].lines if line.get_marker() == "."]
    assert ("dots" in title) == (seeds > 1) == bool(dots)


def test_long_names_stay_on_the_canvas(tmp_path):
    a = write_run(tmp_path / "a", replace(MOE, name="moe_" + 12 * "long_"), 3.5)
    b = write_run(tmp_path / "b", replace(ENGRAM, name="engram_" + 12 * "long_"), 3.25)
    check_picture(comparison_figure(groups_of(a, b), headline(verdicts(a, b)[0])))


def test_picture_of_an_unfinished_run_alone_has_its_curve(capsys, tmp_path):
    assert main([str(write_run(tmp_path / "a", MOE, 3.5, finished=False)), "--output", str(tmp_path / "out")]) == 0
    assert share_of(picture(tmp_path / "out"), STYLES[0][0]) > 0.001


def test_a_run_before_its_first_step_has_no_curve(tmp_path):
    """One that begins from another's checkpoint is evaluated before it trains."""
    a, b = (write_run(tmp_path / name, config, 3.5) for name, config in (("a", MOE), ("b", ENGRAM)))
    for path, lines in ((b, '{"step": 0, "validation_loss": 3.0}\n'), (a, '{"step": 0, "gate": 0.5}\n')):
        (path / "result.json").unlink()
        (path / "metrics.jsonl").write_text(lines)
        assert main([str(path), "--output", str(tmp_path / "alone")]) == 0
    assert main([str(a), str(b), "--output", str(tmp_path / "out")]) == 0
    assert share_of(picture(tmp_path / "out"), STYLES[1][0]) > 0, "the validation point is missing"


def test_an_output_that_cannot_be_written_is_one_line(capsys, monkeypatch, tmp_path):
    path = write_run(tmp_path / "a", MOE, 3.5)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        error = refused(capsys, path, "--output", output)
        assert f"cannot be written to {output}: " in error and "--output" in error

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engram_jax.comparison.picture.draw", full)
    assert main([str(path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: picture and table cannot be written")


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (lambda path: (path / "config.json").unlink(), FAILED, "it has no config.json"),
        (lambda path: (path / "tokenizer.json").unlink(), MISTAKEN, "no tokenizer.json"),
        (lambda path: (path / "metrics.jsonl").unlink(), MISTAKEN, "no metrics.jsonl"),
        (lambda path: (path / "config.json").write_text('{"nmae": "x"}'), MISTAKEN, "no field nmae"),
        (lambda path: (path / "result.json").write_text("{"), MISTAKEN, "cannot be read"),
    ],
)
def test_a_damaged_run_is_refused(capsys, tmp_path, damage, status, message):
    path = write_run(tmp_path / "a", MOE, 3.5)
    damage(path)
    error = refused(capsys, path, status=status)
    assert message in error and str(path) in error


def test_a_missing_folder_no_folder_and_a_run_given_twice(capsys, tmp_path):
    path = write_run(tmp_path / "a", MOE, 3.5)
    assert "is not a run" in refused(capsys, tmp_path / "b", status=FAILED)
    assert "give the folders" in refused(capsys)
    assert "equal settings and seeds: leave one of them out" in refused(capsys, path, path)


def test_help_is_quick_and_says_what_is_written():
    code = (
        "import sys, engram_jax.commands.compare as c\n"
        "try: c.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "compare.png" in done.stdout and "--output" in done.stdout


def test_smoothing_is_a_centred_mean(rng):
    values = rng.normal(size=95)
    half = 3
    expected = [values[max(i - half, 0) : min(i + half, 94) + 1].mean() for i in range(95)]
    np.testing.assert_allclose(smoothed(values), expected, rtol=1e-12)
    np.testing.assert_array_equal(smoothed(values[:5]), values[:5])
