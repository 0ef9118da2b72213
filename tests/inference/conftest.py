import numpy as np
import pytest
from small_models import CONFIGS, PAPER, VOCAB_SIZE, WORDS, built

from engram_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    rng = np.random.default_rng(3)
    return train_tokenizer([f"# {i}\n" + " ".join(rng.choice(WORDS, 120)) for i in range(40)], VOCAB_SIZE)


@pytest.fixture(scope="session", params=CONFIGS)
def model(request, tokenizer):
    """(parts, state) on one device."""
    return built(CONFIGS[request.param], tokenizer)


@pytest.fixture(scope="session")
def paper_model(tokenizer):
    return built(PAPER, tokenizer)
