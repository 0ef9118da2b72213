"""The study `depth` on small runs: states and divergences of the runs themselves, at the ends of names of the text."""

import json
import re

import numpy as np
import pytest

from engram_jax.analysis.logit_lens import DIRECTIONS, logit_lens
from engram_jax.analysis.segments import segments
from engram_jax.errors import RunError
from engram_jax.evaluation.documents import OwnText
from experiments.studies import STUDIES
from experiments.studies.analyses.depth import measure as depth
from experiments.studies.analyses.depth.report import from_rows, verdict
from experiments.studies.engine.declared import FinishedRun


@pytest.fixture(scope="module")
def runs(run_dir, bare_run_dir):
    """Two seeds that are the same runs, whose alignment is known."""
    return [FinishedRun(point, s, d) for s in (0, 1) for point, d in (("moe", bare_run_dir), ("engram", run_dir))]


def test_names_are_whole_and_of_several_tokens(model, monkeypatch):
    monkeypatch.setattr(depth, "NAMES", ("word", "keyword"))  # the text has no others
    own = OwnText(model)
    text = segments(own.data.validation, range(len(own.data.validation)))
    places, decode, count = depth.ends_of_names(model, own, text), model.tokenizer.decode, 0
    for segment, found in zip(text, places, strict=True):
        for place in found:
            ids = segment.ids.tolist()
            word = re.search(r"\w+$", decode(ids[: place + 1]))
            assert word and len(word.group()) > len(decode([ids[place]]).strip()) > 0
            following = decode(ids[place + 1 : place + 2])
            assert not following or re.match(r"\W", following)
            count += 1
    assert count > 50


@pytest.mark.slow
def test_from_runs_to_the_report(model, runs, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="has 0 names of several tokens, and CKA needs 64"):
        STUDIES["depth"].analysis.of_runs(runs, tmp_path)
    monkeypatch.setattr(depth, "NAMES", ("word", "keyword"))
    text = "\n".join(STUDIES["depth"].analysis.of_runs(runs, tmp_path))
    assert "Alignment beyond the control" in text and "nan" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alignment.png", "cka.png", "lens.png", "results.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    own = OwnText(model)
    pieces = segments(own.data.validation, range(len(own.data.validation)))
    lens = logit_lens(model, [piece.ids for piece in pieces], [piece.document for piece in pieces])
    for direction in DIRECTIONS:
        found = [r for r in rows if r.get("direction") == direction and (r["point"], r["seed"]) == ("engram", 1)]
        assert [row["layer"] for row in found] == [-1, 0, 1]
        expected = [metric.value for metric in lens[direction]]  # the same but for float32's rounding
        np.testing.assert_allclose([row["kl"] for row in found], expected, rtol=1e-5, atol=1e-6)
        assert found[0]["documents"] == len({piece.document for piece in pieces})

    likenesses = [row for row in rows if row["measure"] == "cka"]
    assert len(likenesses) == 2 + 4 + 2 and likenesses[0]["names"] > 64
    for row in likenesses:
        same = row["rows"] == row["columns"]
        assert (np.abs(np.diag(row["cka"]) - 1).max() < 1e-6) == same
        assert np.shape(row["cka"]) == (2, 2)  # after every block
    # The control is a run and its copy, so no spread hides what the other model is.
    shifts = [np.mean(row["alignment"]) for row in likenesses if row["columns"] == "engram" != row["rows"]]
    control = [np.mean(row["alignment"]) for row in likenesses if row["columns"] == "moe"]
    assert verdict(from_rows(rows)).alignment.shift.mean == pytest.approx(np.mean(shifts) - np.mean(control), abs=1e-6)
