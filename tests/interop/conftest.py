import numpy as np
import pytest
from interop_run import CONFIG, VOCAB_SIZE, make_run

from engram_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    rng = np.random.default_rng(3)
    words = ["def", "self", "return", "Value", "value", "import", "for", "none", "éß", "漢", "\n", "(", ")", "=", ":"]
    texts = [f"# {i}\n" + " ".join(rng.choice(words, 120)) for i in range(40)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts, VOCAB_SIZE).save(path)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    return make_run(folder, CONFIG, tokenizer_file)
