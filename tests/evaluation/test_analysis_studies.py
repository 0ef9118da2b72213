"""knock_out, frequency and gates on one pair of small runs, against the runs scored and counted in plain Python."""

import functools
import json
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from engram_jax.analysis.lookups import look_up, with_memory
from engram_jax.analysis.token_classes import CLASSES
from engram_jax.data.loader import load_data, train_batches
from engram_jax.errors import RunError
from engram_jax.evaluation.documents import OwnText
from engram_jax.evaluation.evaluated_run import EvaluatedRun
from experiments.studies import STUDIES
from experiments.studies.analyses import trained_runs
from experiments.studies.analyses.gates import measure as gates
from experiments.studies.analyses.knock_out.measure import OFF, TRAINED, TWIN
from experiments.studies.analyses.knock_out.report import from_rows, sentences, verdict
from experiments.studies.analyses.trained_runs import DIFFERENCE
from experiments.studies.engine.declared import FinishedRun

STEP = 4  # of the saved runs
LOWS = (0, 1, 4, 16, 64)


@pytest.fixture(scope="module")
def runs(run_dir, bare_run_dir):
    return [FinishedRun("moe", 0, bare_run_dir), FinishedRun("engram", 0, run_dir)]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Each run once for all three studies, so that it is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_runs, "load", functools.cache(trained_runs.load))
        yield


@pytest.fixture(scope="module")
def windows(model):
    """Held-out windows as training's own evaluation reads them."""
    source = OwnText(model).data.validation
    return [source[i] for i in range(len(source))]


def asked_by_hand(windows):
    """Every token asked for, by the window and place it is asked at."""
    return [(w, t) for w, window in enumerate(windows) for t in np.flatnonzero(window["targets"] >= 0)]


def total_loss(model, windows):
    """The mean over pieces of documents, cut by hand."""
    pieces = []
    for window in windows:
        for number in set(window["segment_ids"].tolist()) - {0}:
            inside = np.flatnonzero(window["segment_ids"] == number)
            ids = [*window["tokens"][inside], *window["targets"][inside[-1:]]]
            pieces.append(np.array(ids[: -1 if ids[-1] < 0 else None], np.int32))
    losses = np.concatenate([one.losses for one in model.score([p for p in pieces if len(p) > 1])])
    return losses.astype(np.float64).mean()


def silent(_):
    pass


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# --- knock_out ---


@pytest.fixture(scope="module")
def knocked_out(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("knock_out")
    return STUDIES["knock_out"].analysis.of_runs(runs, folder), results(folder), folder


def test_losses_are_those_of_the_runs(knocked_out, model, run_dir, bare_run_dir, windows):
    _, rows, folder = knocked_out
    found = {row["variant"]: row for row in rows if row["grouping"] == "all tokens" and "variant" in row}
    assert list(found) == [TWIN, TRAINED, OFF, "layer 0 off", "layer 1 off"]
    assert found[TRAINED]["tokens"] == len(asked_by_hand(windows))
    assert found[TRAINED]["loss"] == pytest.approx(total_loss(model, windows))
    assert found[TWIN]["loss"] == pytest.approx(total_loss(trained_runs.load(bare_run_dir), windows))
    off = EvaluatedRun.load(run_dir, batch_tokens=256, memory_scale=["0"], log=silent)
    assert found[OFF]["loss"] == pytest.approx(total_loss(off, windows))
    for variant, scales in ((OFF, {0: 0.0, 1: 0.0}), ("layer 1 off", {1: 0.0})):
        assert found[variant]["loss"] == pytest.approx(total_loss(with_memory(model, scales), windows))
    assert (folder / "knock_out.png").stat().st_size > 20_000


def test_groups_are_parts_of_the_whole(knocked_out):
    _, rows, _ = knocked_out
    for variant in (TWIN, OFF):
        of = [row for row in rows if row.get("variant") == variant]
        (whole,) = (row for row in of if row["grouping"] == "all tokens")
        for grouping in ("kind", "n-gram in training"):
            parts = [row for row in of if row["grouping"] == grouping]
            assert sum(row["tokens"] for row in parts) == whole["tokens"] and len(parts) > 2
            for name in ("loss", "accuracy"):
                total = sum(row["tokens"] * row[name] for row in parts)
                assert total / whole["tokens"] == pytest.approx(whole[name])


def test_differences_are_recomputed_from_the_losses(knocked_out):
    lines, rows, _ = knocked_out
    losses = {(row["group"], row["variant"]): row["loss"] for row in rows if "variant" in row}
    differences = [row for row in rows if "difference" in row]
    assert len(differences) > 40
    for row in differences:
        ours, theirs = row["difference"].split(" - ")
        assert row["mean"] == pytest.approx(losses[row["group"], ours] - losses[row["group"], theirs], abs=1e-6)
        assert row["std_seeds"] is None
    (whole,) = (r for r in differences if r["group"] == "all" and r["difference"] == f"{OFF} - {TRAINED}")
    found = verdict(from_rows(rows))
    assert (found.cost.mean, found.cost.stderr) == pytest.approx((whole["mean"], whole["stderr_documents"]))
    assert all(f"- {sentence}" in lines for sentence in sentences(found, (0,)))
    assert any(line.startswith("| all ") and "| 100.0% " in line for line in lines)


def test_kinds_are_those_of_the_text(knocked_out, held_out_words):
    """The corpus's capital-free words, marks and a few letters of other alphabets: prose, for it does not parse."""
    _, rows, _ = knocked_out
    kinds = {row["group"]: row["tokens"] for row in rows if row.get("variant") == TRAINED and row["grouping"] == "kind"}
    assert set(kinds) <= set(CLASSES) and "keyword" not in kinds
    # One-character tokens of this corpus: each mark is a token, and so is each digit of the first line.
    assert kinds["number"] == held_out_words["digits"]
    assert kinds["end of document"] == held_out_words["documents"]


@pytest.fixture(scope="module")
def held_out_words(model):
    stream = OwnText(model).data.validation.stream
    texts = model.tokenizer.decode(stream.tokens[:].tolist(), skip_special_tokens=True)
    return {"digits": sum(c.isdigit() for c in texts), "documents": stream.num_documents}


# --- frequency ---


@pytest.fixture(scope="module")
def by_frequency(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frequency")
    return STUDIES["frequency"].analysis.of_runs(runs, folder), results(folder), folder


@pytest.fixture(scope="module")
def read_windows(model, config):
    """The windows of the training batches, each once."""
    data = load_data(config.data, config.model.vocab_size, silent)
    with train_batches(data.train, config.data.batch_size, config.data.seed) as batches:
        read = [next(batches) for _ in range(STEP)]
    unique = {}
    for batch in read:
        for row in range(len(batch["tokens"])):
            unique[batch["tokens"][row].tobytes()] = {name: x[row] for name, x in batch.items()}
    return list(unique.values())


def shares_by_hand(windows, read_windows, own):
    occurrences = Counter(tuple(w["tokens"][t - 2 : t + 1]) for w in read_windows for t in range(2, len(w["tokens"])))
    buckets = []
    for window in windows:
        for t in np.flatnonzero(window["targets"] >= 0):
            if t >= 2 and window["segment_ids"][t - 2] == window["segment_ids"][t]:
                seen = occurrences[tuple(window["tokens"][t - 2 : t + 1])] - own
                buckets.append(np.searchsorted(LOWS, seen, side="right") - 1)
    return np.bincount(buckets, minlength=5) / len(buckets)


def of(rows, text, quantity):
    return {r["occurrences"]: r["mean"] for r in rows if (r["text"], r["quantity"]) == (text, quantity)}


def test_frequencies_leave_out_the_tokens_own_occurrence(by_frequency, windows, read_windows):
    _, rows, _ = by_frequency
    held_out = shares_by_hand(windows, read_windows, own=0)
    assert list(of(rows, "held-out text", "share").values()) == pytest.approx(held_out[held_out > 0])
    training, found = shares_by_hand(read_windows, read_windows, own=1), of(rows, "training text", "share")
    assert list(found.values()) == pytest.approx(training[training > 0]) and "0" in found


def test_unread_windows_are_the_rest(by_frequency, model, read_windows):
    _, rows, _ = by_frequency
    source = OwnText(model).data.train
    known = {window["tokens"].tobytes() for window in read_windows}
    unread = [window for i in range(len(source)) if (window := source[i])["tokens"].tobytes() not in known]
    assert len(unread) == len(source) - len(read_windows) > 20
    shares = shares_by_hand(unread, read_windows, own=0)
    found = of(rows, "unread parts of training documents", "share")
    assert list(found.values()) == pytest.approx(shares[shares > 0])


def test_losses_and_memory_by_frequency(by_frequency, model):
    lines, rows, folder = by_frequency
    for text in ("training text", "unread parts of training documents", "held-out text"):
        ours, theirs, by = (of(rows, text, name) for name in ("engram", "moe", DIFFERENCE))
        assert by == pytest.approx({label: ours[label] - theirs[label] for label in ours}, abs=1e-6)
        for layer in ("0", "1"):
            assert all(0 < gate < 1 for gate in of(rows, text, f"gate {layer}").values())
            # The saved tables were never updated: no row has an age.
            assert of(rows, text, f"age {layer}") == {} and set(of(rows, text, f"uses {layer}").values()) == {0.0}
    assert (folder / "frequency.png").stat().st_size > 20_000
    assert sum(line.startswith("| all, held-out shares ") for line in lines) == 2


# --- gates ---


@pytest.fixture(scope="module")
def gated(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    return STUDIES["gates"].analysis.of_runs(runs, folder), results(folder), folder


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.open, self.captions = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        assert tag not in ("script", "link", "img"), "the page needs something else"

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "figcaption":
            self.captions.append(data)


def test_the_page_shows_the_gates(gated, model):
    _, _, folder = gated
    page = Cells()
    page.feed((folder / "gates.html").read_text())
    text = gates.SENTENCES[0]
    assert page.captions[0] == text and len(page.captions) > len(gates.SENTENCES)
    ids = model.tokenizer.encode(text)
    (lookup,) = look_up(model, [np.array([model.tokenizer.bos_id, *ids, model.tokenizer.eos_id], np.int32)])
    tokens, *layers, saved = page.rows[:4]
    assert len(tokens) == len(saved) == 1 + len(ids) and saved[0] == "saves on the next token"
    for layer, row in zip(("0", "1"), layers, strict=True):
        assert row[0] == f"layer {layer}, stream 0"
        assert row[1:] == [f"{gate:.2f}" for gate in lookup.gates[layer][1:, 0]]
    assert (folder / "gates.png").stat().st_size > 20_000


def test_gates_are_correlated_with_what_each_layer_saves(gated, model):
    lines, rows, _ = gated
    assert {(r["layer"], r["stream"]) for r in rows} == {(0, 0), (1, 0)}
    own = OwnText(model)
    pieces = gates.segments(own.data.validation, range(len(own.data.validation)))
    gate_N = np.concatenate([one.gates["1"][:, 0] for one in look_up(model, [p.ids for p in pieces])])
    saved_N = (
        trained_runs.score(with_memory(model, {1: 0.0}), pieces).losses_N - trained_runs.score(model, pieces).losses_N
    )
    expected = np.corrcoef(gate_N.argsort().argsort(), saved_N.argsort().argsort())[0, 1]  # hardly any ties
    found = {(r["layer"], r["quantity"]): r["mean"] for r in rows}
    assert found[1, "saved by this layer"] == pytest.approx(expected, abs=0.01)
    assert found[1, "mean gate"] == pytest.approx(gate_N.mean(), rel=1e-5)
    assert found[0, "saved against the twin"] is not None and any("rank correlation" in line for line in lines)


def test_runs_of_different_texts_are_refused(runs, run_dir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((run_dir / "tokenizer.json").read_bytes())
    result = {"corpus_sha256": "another", "loss": 4.0, "bits_per_byte": 2.0}
    (other / "result.json").write_text(json.dumps(result))
    for name in ("knock_out", "frequency", "gates", "depth"):
        with pytest.raises(RunError, match="different texts"):
            STUDIES[name].analysis.of_runs([runs[0], FinishedRun("engram", 0, other)], tmp_path)
