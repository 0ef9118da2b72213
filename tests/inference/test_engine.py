"""The engine against drawing one token after the other from whole sequences."""

import jax
import numpy as np
import pytest
from small_models import MAX_LEN, PAPER, VOCAB_SIZE, built, full_logits
from test_extend import random_tokens

from engram_jax.config import ConfigError, replace
from engram_jax.inference.engine import Engine
from engram_jax.inference.sampling import Sampling

GREEDY = Sampling(max_tokens=9, temperature=0)
FREE = Sampling(max_tokens=12, temperature=1.0, top_k=0, seed=4)


@pytest.fixture(scope="module")
def engine(paper_model):
    return Engine(*paper_model, batch_size=3, max_len=MAX_LEN, chunk=7, spare=4)


def check_greedy(model, prompts, made):
    """Each token is the most probable one; two sums in another order: a tie to 1e-4 may go either way."""
    logits = full_logits(*model, [prompt + new for prompt, new in zip(prompts, made, strict=True)])
    for i, (prompt, new) in enumerate(zip(prompts, made, strict=True)):
        for j, token in enumerate(new):
            after = logits[i, len(prompt) + j - 1]
            assert after[token] >= after.max() - 1e-4, f"prompt {i}, new token {j}"


def test_more_prompts_than_places_of_all_lengths(engine, paper_model, rng):
    prompts = [random_tokens(rng, n) for n in (1, 20, 7, 8, 3, 30, 2)]
    made = engine.generate(prompts, GREEDY)
    assert [len(new) for new in made] == [9] * 7
    check_greedy(paper_model, prompts, made)


def test_what_else_is_in_the_batch_does_not_matter(engine, paper_model, rng):
    prompts = [random_tokens(rng, n) for n in (5, 11, 4, 2)]
    together = engine.generate(prompts, FREE)
    assert together == engine.generate(prompts, FREE)
    assert together[0] == Engine(*paper_model, batch_size=1, max_len=MAX_LEN, chunk=5).generate(prompts[:1], FREE)[0]
    assert together != engine.generate(prompts, replace(FREE, seed=5))


def test_it_ends_before_the_end_token_and_the_others_go_on(engine, rng):
    prompts = [random_tokens(rng, n) for n in (5, 3, 9, 2)]
    whole = engine.generate(prompts, FREE)
    eos = whole[1][4]
    cut = [new[: new.index(eos)] if eos in new else new for new in whole]
    assert engine.generate(prompts, FREE, eos) == cut


def test_the_room_is_used_to_the_last_place(engine, paper_model, rng):
    prompts = [random_tokens(rng, n) for n in (MAX_LEN - 1, MAX_LEN - 5)]
    made = engine.generate(prompts, GREEDY)
    assert [len(new) for new in made] == [1, 5]
    check_greedy(paper_model, prompts, made)


def test_a_conversation_reads_only_what_is_new(engine, paper_model, rng, monkeypatch):
    """A prompt that goes on from what a place holds, or from a little before its end."""
    read, start = [], Engine._start

    def recorded(self, sampling):
        read.append(max(len(place.unread) for place in self._places))
        return start(self, sampling)

    monkeypatch.setattr(Engine, "_start", recorded)
    prompt = random_tokens(rng, 8)
    for step, (said, more) in enumerate(
        ((9, 3), (6, 2), (0, 0))
    ):  # of nine new tokens eight are in the cache, so two are taken back
        read.clear()
        made = engine.generate([prompt], GREEDY)
        check_greedy(paper_model, [prompt], made)
        assert read[0] == (8, 4, 2)[step]
        prompt = [*prompt, *made[0][:said], *random_tokens(rng, more)]


def test_ends_taken_back_again_and_again(paper_model, rng):
    """Each by at most `spare`, together by more: what has left the memory's windows is read anew."""

    def windows(engine, prompt):
        """What the memory remembers of the last positions, once one token was drawn after the prompt."""
        engine.generate([prompt], replace(GREEDY, max_tokens=1))
        return jax.tree.map(lambda kept: kept[:, engine.spare :], (engine._cache.canonical_BW, engine._cache.readers))

    def small():
        return Engine(*paper_model, batch_size=1, max_len=MAX_LEN, chunk=7, spare=4)

    engine, first = small(), rng.permutation(VOCAB_SIZE)[:36].tolist()
    windows(engine, first[:30])
    for kept in (27, 24, 22):
        prompt = [*first[:kept], first[35 - kept % 5]]  # another token than the one that was there
        jax.tree.map(np.testing.assert_array_equal, windows(engine, prompt)[0], windows(small(), prompt)[0])
        for ours, theirs in zip(*(jax.tree.leaves(windows(x, prompt)[1]) for x in (engine, small())), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_an_unfinished_stream_leaves_no_trace(engine, rng):
    prompts = [random_tokens(rng, n) for n in (5, 3)]
    expected = engine.generate(prompts, FREE)
    before = jax.sharding.get_abstract_mesh()
    stream = engine.stream([random_tokens(rng, 4)], FREE)
    next(stream), next(stream)
    assert jax.sharding.get_abstract_mesh() == before
    assert engine.generate(prompts, FREE) == expected
    with pytest.raises(RuntimeError, match="Another stream"):
        next(stream)
    assert engine.generate(prompts, FREE) == expected


def test_over_devices(tokenizer, engine, rng):
    config = replace(PAPER, train__mesh_fsdp=2, train__mesh_tensor=2)
    sharded = Engine(*built(config, tokenizer, devices=4), batch_size=4, max_len=MAX_LEN, chunk=7)
    prompts = [random_tokens(rng, n) for n in (5, 11, 4, 2, 3)]
    assert sharded.generate(prompts, FREE) == engine.generate(prompts, FREE)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([5, VOCAB_SIZE], "outside 0..299"), ([-1], "outside"), ([1] * MAX_LEN, f"max_len={MAX_LEN}")],
)
def test_prompts_that_cannot_work(engine, prompt, message):
    with pytest.raises(ConfigError, match=message):
        engine.generate([[1, 2], prompt], GREEDY)


def test_settings_that_cannot_work(paper_model, tokenizer):
    for name, value in {"chunk": 0, "spare": -1}.items():
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            Engine(*paper_model, **{name: value})
    with pytest.raises(ConfigError, match="batch_size=3 is not a multiple of the 2 devices"):
        Engine(*built(replace(PAPER, train__mesh_fsdp=2), tokenizer, devices=2), batch_size=3)
    with pytest.raises(ConfigError, match="mesh_context=2"):
        Engine(*built(replace(PAPER, train__mesh_context=2), tokenizer, devices=2))
