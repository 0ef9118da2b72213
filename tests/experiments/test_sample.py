"""Sampling by re-computation against a model run once over the whole text."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engram_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    ConfigError,
    EngramConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    to_dict,
)
from engram_jax.data.tokenizer import load_tokenizer, train_tokenizer
from engram_jax.inference.sampling import Sampling, choose, generate, next_logits
from engram_jax.training.assembly import assemble
from engram_jax.training.checkpoint import Checkpoints
from experiments.sample import main

VOCAB_SIZE = 300
CONFIG = RunConfig(
    name="small",
    model=ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        attention=AttentionConfig(
            num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=16
        ),
        moe=MoEConfig(
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=16,
            first_k_dense_replace=0,
        ),
        engram=EngramConfig(engram_layer_ids=(0,), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101),
        hc_mult=2,
        hc_sinkhorn_iters=2,
        dtype="float32",
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
)
WORDS = ["def", "self", "return", "value", "import", "for", "none", "éß", "漢", "\n", "(", ")", "=", ".", ":"]


def make_texts(count: int) -> list[str]:
    rng = np.random.default_rng(3)
    return [f"# {i}\n" + " ".join(rng.choice(WORDS, 120)) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_texts(40), VOCAB_SIZE)


@pytest.fixture(scope="module")
def model(tokenizer):
    """(parts, state) on one device, with weights and rows large enough for every token to matter."""
    parts = assemble(CONFIG, tokenizer.backend, jax.devices()[:1])
    rng = np.random.default_rng(11)

    def perturbed(x, scale):
        return jax.device_put(np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
    tables = {name: dataclasses.replace(t, rows=perturbed(t.rows, 1.0)) for name, t in state.memory.tables.items()}
    params = jax.tree.map(lambda p: perturbed(p, 0.1), state.params)
    return parts, dataclasses.replace(state, params=params, memory=dataclasses.replace(state.memory, tables=tables))


@pytest.fixture
def rng():
    return np.random.default_rng()


@partial(jax.jit, static_argnums=0)
def full_logits(parts, state, tokens_1T):
    """Logits after each token, from one pass without padding or segments: [T, V]."""
    rows = parts.store.fetch(state.memory, parts.store.plan(tokens_1T), state.step)
    model = parts.model(state.params, state.buffers)
    return model.logits(model.hidden(tokens_1T, rows)[0])[0]


def random_prompt(rng, length: int) -> list[int]:
    return rng.integers(3, VOCAB_SIZE, length).tolist()


def test_greedy_takes_the_most_probable_token_at_every_step(model, rng):
    parts, state = model
    prompt = random_prompt(rng, 9)
    new = list(generate(parts, state, prompt, Sampling(max_tokens=28, temperature=0)))
    assert len(new) == 28 and len(set(new)) > 3
    with jax.set_mesh(parts.mesh):
        logits_TV = np.asarray(full_logits(parts, state, np.array([prompt + new], np.int32)))
    for i, token in enumerate(new):
        # Two sums in another order: a tie to 1e-4 may go either way.
        after = logits_TV[len(prompt) + i - 1]
        assert after[token] >= after.max() - 1e-4, f"new token {i}"


def test_padding_changes_nothing(model, rng):
    """Whatever stands in the buffer behind the text."""
    parts, state = model
    buffer_T, length = np.array(random_prompt(rng, 64), np.int32), 37
    with jax.set_mesh(parts.mesh):
        logits = jax.jit(next_logits, static_argnums=0)(parts, state, buffer_T, length)
        expected = full_logits(parts, state, buffer_T[None, :length])[-1]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_every_device_computes_the_same_on_a_mesh(tokenizer, model, rng):
    parts = assemble(CONFIG, tokenizer.backend, jax.devices()[:4])
    sharding = lambda x: NamedSharding(parts.mesh, x.sharding.spec)  # noqa: E731

    def cut(layer, array):
        """A whole table's array as the four devices own it."""
        layout = parts.store.layouts[layer]
        shards = np.zeros((4 * layout.rows_per_shard, *array.shape[1:]), array.dtype)
        shards[layout.logical_order()] = np.asarray(array)
        return jax.device_put(shards, sharding(array))

    memory = model[1].memory
    tables = {layer: jax.tree.map(lambda x, la=layer: cut(la, x), table) for layer, table in memory.tables.items()}
    bare = dataclasses.replace(model[1], memory=dataclasses.replace(memory, tables={}))
    state = jax.tree.map(lambda x: jax.device_put(np.asarray(x), sharding(x)), bare)
    state = dataclasses.replace(state, memory=dataclasses.replace(state.memory, tables=tables))
    prompt, sampling = random_prompt(rng, 7), Sampling(max_tokens=6, temperature=1.0, top_k=0)
    assert list(generate(parts, state, prompt, sampling)) == list(generate(*model, prompt, sampling))


def test_the_seed_decides_the_text(model, rng):
    prompt = random_prompt(rng, 5)
    texts = [
        list(generate(*model, prompt, Sampling(max_tokens=24, temperature=1.0, top_k=0, seed=seed)))
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_longer_text_begins_like_the_shorter(model, rng):
    prompt = random_prompt(rng, 5)
    short, long = (list(generate(*model, prompt, Sampling(max_tokens=n, top_k=0))) for n in (10, 80))
    assert len(short) == 10 and long[:10] == short


def test_it_stops_before_the_end_token(model, rng):
    prompt, greedy = random_prompt(rng, 5), Sampling(max_tokens=20, temperature=0)
    whole = list(generate(*model, prompt, greedy))
    stopped = list(generate(*model, prompt, greedy, eos_id=whole[7]))
    assert stopped == whole[: whole.index(whole[7])]


def test_a_suspended_generator_leaves_no_mesh_behind(model, rng):
    before = jax.sharding.get_abstract_mesh()
    tokens = generate(*model, random_prompt(rng, 5), Sampling(max_tokens=3))
    next(tokens)
    assert jax.sharding.get_abstract_mesh() == before


def draws(logits, temperature: float, top_k: int, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(int(np.random.default_rng().integers(1 << 31))), count)
    return np.asarray(jax.vmap(lambda key: choose(logits, key, temperature, top_k))(keys))


def test_top_k_restricts_the_support(rng):
    logits = jax.numpy.asarray(rng.normal(size=40), "float32")
    best = np.argsort(-np.asarray(logits))
    assert set(draws(logits, 5.0, 3)) == set(best[:3])
    assert set(draws(logits, 5.0, 1)) == {best[0]} == set(draws(logits, 0.0, 0))
    assert len(set(draws(logits, 100.0, 0))) == 40 == len(set(draws(logits, 100.0, 1000)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(rng, temperature):
    logits = rng.normal(size=8)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    counts = np.bincount(draws(jax.numpy.asarray(logits, "float32"), temperature, 0), minlength=8)
    # Five standard deviations of a binomial share.
    np.testing.assert_array_less(np.abs(counts / 4000 - expected), 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ([5, VOCAB_SIZE], "outside 0..299"), ([-1], "outside")])
def test_prompts_that_cannot_work(model, prompt, message):
    with pytest.raises(ConfigError, match=message):
        next(generate(*model, prompt, Sampling()))


# --- the command ---


@pytest.fixture(scope="module")
def trained(model, tokenizer, tmp_path_factory):
    """The folder of a run with one checkpoint."""
    parts, state = model
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.json").write_text(json.dumps(to_dict(parts.config)))
    tokenizer.save(folder / "tokenizer.json")
    with jax.set_mesh(parts.mesh), Checkpoints(folder / "checkpoints", CheckpointConfig(), parts) as checkpoints:
        checkpoints.save(2, state, {"hash_constants": parts.store.constants.to_dict()})
    return folder


def test_a_trained_run_continues_a_prompt(capsys, trained):
    def sampled(*options):
        assert main([str(trained), "def é", *options]) == 0
        return capsys.readouterr().out

    text = sampled("--max_tokens", "12", "--top_k", "0", "--temperature", "2")
    assert text.startswith("def é") and text.endswith("\n") and len(text) > len("def é\n")
    assert sampled("--max_tokens", "12", "--top_k", "0", "--temperature", "2") == text
    assert sampled("--max_tokens", "12", "--top_k", "0", "--temperature", "2", "--seed", "1") != text


def test_printed_pieces_are_the_decoded_text(capsys, monkeypatch, trained):
    """Characters of several tokens come whole, and special tokens not at all."""
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    ids = [*tokenizer.encode(" 漢字 😀é"), tokenizer.pad_id, *tokenizer.encode("\n  end")]
    monkeypatch.setattr("engram_jax.inference.sampling.generate", lambda *arguments: iter(ids))
    assert main([str(trained), "def"]) == 0
    assert capsys.readouterr().out == "def 漢字 😀é\n  end\n"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["{run}", "x", "--temperature", "-1"], 2, "temperature=-1"),
        (["{run}/nowhere", "x"], 1, "is not a run"),
    ],
)
def test_mistakes_are_one_line(capsys, trained, options, status, message):
    assert main([option.format(run=trained) for option in options]) == status
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    assert message in streams.err


def test_help_shows_the_options_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--max_tokens" in out and "(default: 200)" in out and "--top_k" in out
