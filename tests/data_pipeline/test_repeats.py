"""Epochs: as many as the batches really hold, and one line about them."""

import re
from collections import Counter

import numpy as np
import pytest

from engram_jax.config import DataConfig
from engram_jax.data.loader import train_batches
from engram_jax.data.mixture import Mixture
from engram_jax.data.packing import TokenStream, WindowSource
from engram_jax.data.repeats import epochs, repeats_line

SEQ_LEN, BATCH = 8, 6


@pytest.fixture
def source(tmp_path):
    """A corpus of so many windows, all tokens of which are `token`."""

    def make(token, num_windows):
        tokens = np.full(num_windows * SEQ_LEN + 3, token, "<u2")
        path = tmp_path / f"of{token}"
        path.with_suffix(".tokens").write_bytes(tokens.tobytes())
        path.with_suffix(".starts").write_bytes(np.zeros(1, "<i8").tobytes())
        return WindowSource(TokenStream(path, "<u2", len(tokens), 1, 1), SEQ_LEN, 2, keep_partial=False)

    return make


def config(corpus):
    return DataConfig(corpus=corpus, seq_len=SEQ_LEN, batch_size=BATCH)


def test_epochs_are_what_the_batches_hold(source):
    sizes = {5: 31, 7: 9}
    train = Mixture([source(token, size) for token, size in sizes.items()], [0.6, 0.4])
    steps = 20
    with train_batches(train, BATCH, seed=3) as batches:
        seen = Counter(int(row[0]) for _ in range(steps) for row in next(batches)["tokens"])
    expected = {f"/of{token}": seen[token] / size for token, size in sizes.items()}
    assert epochs(train, config("/of5:0.6,/of7:0.4"), steps) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (5, None),
        (6, r"^Epochs: 288 tokens are asked for, so the run sees books 1\.2 times\.$"),
        (20, r"^Epochs: .*4\.0"),
    ],
)
def test_a_few_epochs_are_told(source, steps, said):
    line = repeats_line(source(5, 30), config("books"), steps)
    assert re.search(said, line) if said else line == ""


def test_many_epochs_are_warned_of(source):
    train = Mixture([source(5, 900), source(7, 4)], [0.5, 0.5])
    line = repeats_line(train, config("large:1,little:1"), steps=10)
    assert line.startswith("warning: 480 tokens are asked for, so the run sees little 7.5 times. ")
    assert "large" not in line and "data.corpus" in line and "\n" not in line
