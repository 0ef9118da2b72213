"""Results side by side, from records made by hand."""

import math
from pathlib import Path

import pytest

from engram_jax.evaluation.paper_results import PaperRow, PaperTable, paper_tables
from engram_jax.evaluation.ruler.families import GROUPS
from engram_jax.evaluation.table import ERROR_NOTE, PAIRED_NOTE, columns, ours, render, side_by_side, signed


def record(name="a", loss=(10.0, 30.0), sha="x", corpus="", scale=None, task="perplexity", **details):
    tokens = [5, 10]
    metric = {"value": sum(loss) / 15, "stderr": 0.25, "count": 15, "clusters": 2, "unit": "nats per token"}
    per_document = {"loss": list(loss), "tokens": tokens, "bytes": [10, 20]}
    details = {
        "corpus": corpus or "held out",
        "documents_sha256": sha,
        "context": 8,
        "stride": 4,
        "per_document": per_document,
    } | details
    metrics = {"loss": metric, "nothing": {"value": None}}
    return {
        "run": {"name": name},
        "shared": {"corpus": corpus},
        "memory_scale": scale or {},
        "tasks": {task: {"metrics": metrics, "details": details}},
    }


def rows(text: str) -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {line[0]: line[1:] for line in lines}


def columns_of(*records):
    return columns([(Path(f"runs/{i}"), r) for i, r in enumerate(records)])


def shown(*records, paper=()):
    return render(columns_of(*records), paper)


def metrics(*records):
    """The rows of metrics, by task, name, and the run that was subtracted."""
    return {(row.task, row.name, row.minus): row.cells for row in side_by_side(columns_of(*records)).metrics}


def test_numbers_and_what_is_missing():
    found = metrics(record("a"), record("b", task="other"))
    mine, nothing = found["perplexity", "loss", ""]
    assert (mine.value, mine.stderr) == (pytest.approx(40 / 15), 0.25) and nothing is None
    assert found["other", "loss", ""][0] is None
    found = rows(shown(record("a"), record("b", task="other")))
    assert found["perplexity: loss (nats per token)"] == ["2.6667 ± 0.2500", "-"]
    assert found["other: loss (nats per token)"] == ["-", "2.6667 ± 0.2500"]
    assert found["perplexity: nothing"] == ["-", "-"]


def test_differences_are_paired_by_document():
    """2 and 3 nats less on 5 and 10 tokens: -5/15, from residuals of 2/3 on each side."""
    given = record("a", loss=(10.0, 30.0)), record("b", loss=(8.0, 27.0))
    mean = -5 / 15
    residuals = (-2 - mean * 5, -3 - mean * 10)
    stderr = math.sqrt(2 * sum(r * r for r in residuals)) / 15
    first, difference = metrics(*given)["perplexity", "loss", "a"]
    assert first is None and (difference.value, difference.stderr) == pytest.approx((mean, stderr))
    assert side_by_side(columns_of(*given)).not_comparable == ()
    assert rows(shown(*given))["perplexity: loss, minus a"] == ["-", f"{mean:+.4f} ± {stderr:.4f}"]
    assert signed(difference.scaled(-1, "")) == f"+{-mean:.4f} ± {stderr:.4f}"


def test_what_the_errors_are_is_said_once():
    """The ± of a paired difference is another one than that of the losses above it."""
    text = shown(record("a"), record("b"))
    assert text.count(ERROR_NOTE) == text.count(PAIRED_NOTE) == 1
    assert PAIRED_NOTE not in shown(record("a")) and ERROR_NOTE in shown(record("a"))
    without = record("a")
    without["tasks"]["perplexity"]["metrics"]["loss"]["stderr"] = None
    assert ERROR_NOTE not in shown(without)


@pytest.mark.parametrize("difference", [{"sha": "y"}, {"stride": 2}, {"context": 16}])
def test_other_tokens_or_windows_are_not_subtracted(difference):
    given = record("a"), record("b", **difference)
    assert metrics(*given)["perplexity", "loss", "a"] == (None, None)
    assert side_by_side(columns_of(*given)).not_comparable == (("perplexity", "b"),)
    text = shown(*given)
    assert "perplexity: b scored other tokens than a, or in other windows." in text and PAIRED_NOTE not in text


def test_columns_are_runs_and_scales():
    off, half = {"1": 0.0, "2": 0.0}, {"1": 1.0, "2": 0.5}
    given = [record("a"), record("a", scale=off), record("a", scale=half), record("a", scale={"1": 1.0, "2": 1.0})]
    labels = [column.label for column in columns([(Path("runs/a"), r) for r in given])]
    assert labels == ["a", "a (memory 0)", "a (memory 1=1 2=0.5)"]
    two = columns([(Path("x/a"), record("a")), (Path("y/a"), record("a"))])
    assert [column.label for column in two] == ["x/a", "y/a"]


def test_the_newest_of_equal_measurements_counts():
    path = Path("runs/a")
    [column] = columns([(path, record(loss=(1.0, 1.0))), (path, record(loss=(2.0, 4.0)))])
    assert column.tasks["perplexity"]["metrics"]["loss"]["value"] == pytest.approx(6 / 15)


def test_each_corpus_has_rows_of_its_own():
    [column] = columns([(Path("a"), record()), (Path("a"), record(corpus="/texts/books/"))])
    assert set(column.tasks) == {"perplexity", "perplexity on books"}


def test_buckets_side_by_side():
    by_bucket = {"0": {"loss": 5.0, "stderr": 0.5, "share": 0.25}, "64+": {"loss": 2.0, "stderr": None, "share": 0.75}}
    given = record("a", by_ngram_frequency=by_bucket), record("b", by_ngram_frequency={"64+": by_bucket["64+"]})
    [(_, rare_and_frequent)] = side_by_side(columns_of(*given)).buckets.items()
    assert [(row.name, row.share, [cell and cell.value for cell in row.cells]) for row in rare_and_frequent] == [
        ("0", 0.25, [5.0, None]),
        ("64+", 0.75, [2.0, 2.0]),
    ]
    text = shown(*given)
    assert rows(text)["0 (25.0% of tokens)"] == ["5.0000 ± 0.5000", "-"]
    assert rows(text)["64+ (75.0% of tokens)"] == ["2.0000", "2.0000"]
    diverged = {"64+": {"loss": None, "stderr": None, "share": 1.0}}  # NaN as it is saved
    found = rows(shown(record("a", by_ngram_frequency=by_bucket), record("b", by_ngram_frequency=diverged)))
    assert found["64+ (75.0% of tokens)"] == ["2.0000", "-"]


def test_lines_line_up():
    for block in shown(record("a"), record("with a longer name"), paper=paper_tables()).split("\n\n"):
        lengths = {len(line) for line in block.splitlines() if line.startswith("|")}
        assert len(lengths) <= 1


def test_the_papers_tables():
    """Against figures read off the paper by hand."""
    first, second = paper_tables()
    assert first.models == ("Dense-4B", "MoE-27B", "Engram-27B", "Engram-40B") and len(first.rows) == 29
    by_name = {row.name: row.values for row in (*first.rows, *second.rows)}
    assert by_name["Validation (loss)"] == (1.768, 1.634, 1.622, 1.61)
    assert by_name["MMLU, 5-shot"] == (48.6, 57.4, 60.4, 60.6)
    assert by_name["BBH (EM), 3-shot"] == (42.8, 50.9, 55.9, 57.5)
    assert by_name["RULER NIAH multi-query"] == (84.2, 89.5, 97.0, 97.0)
    assert by_name["LongPPL, long chains of thought"] == (14.16, 14.26, 13.59, 13.41)
    assert len(second.models) == 4 and len(second.rows) == 12
    assert all(len(row.values) == 4 for row in (*first.rows, *second.rows))


@pytest.mark.parametrize(
    ("patterns", "numbers", "value", "length"),
    [
        (("none/acc", "perplexity/loss"), {"loss": 0.5}, 50.0, ""),
        (("perplexity/exact_match*",), {"loss": 0.5, "exact_match[strict]": 0.25}, 25.0, ""),
        (("perp*/vt@*",), {"vt@512": 0.1, "vt@32768": 0.3, "vt@4096": 0.2}, 30.0, "32768"),
        (("perp*/vt@*",), {"vt@512": 0.1, "vt@4096": 0.2}, 20.0, "4096"),
        (("perplexity/acc",), {"loss": 0.5}, None, ""),
    ],
)
def test_ours_stands_in_the_papers_unit(patterns, numbers, value, length):
    row = PaperRow("MMLU", (60.4,), patterns, 100.0)
    given = record("a")
    given["tasks"]["perplexity"]["metrics"] = {name: {"value": x, "stderr": 0.25} for name, x in numbers.items()}
    found = ours(columns_of(given)[0], row)
    assert found is None if value is None else (found[0].value, found[0].stderr, found[1]) == (value, 25.0, length)
    text = "-" if value is None else f"{value:.4f} ± 25.0000" + (" at 4096" if length == "4096" else "")
    assert rows(shown(given, paper=[PaperTable("Table 9", ("Big",), (row,))]))["MMLU"] == [text, "60.4"]


def test_every_pattern_of_the_papers_rows_names_a_task():
    """`lm_eval:NAME/METRIC` or a group of RULER's."""
    patterns = [pattern for table in paper_tables() for row in table.rows for pattern in row.ours]
    assert len(patterns) > 20
    for pattern in patterns:
        word, _, metric = pattern.partition("/")
        assert word.startswith("lm_eval:") or (word == "ruler*" and metric.partition("@")[0] in GROUPS)
