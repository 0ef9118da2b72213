"""Small texts and the data settings that read them."""

import numpy as np
import pytest

from engram_jax.config import DataConfig


def make_texts(seed: int, count: int) -> list[str]:
    """Documents of 20 to 119 words over a vocabulary of 400, some of it not ASCII."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnoprstuvéßЖ漢😀"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(400)]
    return [f"{seed}.{i}: " + " ".join(rng.choice(words, rng.integers(20, 120))) + " <|eos|>\n" for i in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(seed=7, count=120)


@pytest.fixture(scope="session")
def text_folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def config(text_folder, tmp_path) -> DataConfig:
    return DataConfig(
        corpus=str(text_folder), cache_dir=str(tmp_path / "cache"), seq_len=32, batch_size=8, holdout_fraction=0.2
    )
