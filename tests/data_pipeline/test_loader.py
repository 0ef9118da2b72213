import dataclasses
import json

import numpy as np
import pytest

from engram_jax.config import ConfigError, DataConfig
from engram_jax.data.loader import eval_batches, load_data, train_batches


@pytest.fixture(scope="module")
def data(text_folder, tmp_path_factory):
    config = DataConfig(
        corpus=str(text_folder),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        seq_len=32,
        batch_size=8,
        holdout_fraction=0.2,
    )
    return load_data(config, 400, log=lambda _: None)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def joined(parts):
    """All rows of several batches."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_load_data_end_to_end(data, config):
    lines = []
    again = load_data(config, 400, lines.append)
    assert again.corpus_sha256 == data.corpus_sha256
    assert again.tokenizer.sha256 == data.tokenizer.sha256
    assert any("training: " in line and "tokens" in line for line in lines)
    assert len(data.train) == data.train.stream.num_tokens // 32
    assert len(data.validation) == -(-data.validation.stream.num_tokens // 32)
    text = data.tokenizer.decode(data.train[0]["tokens"])
    assert text.startswith("7.")


def test_batches_are_int32_windows_of_the_source(data):
    windows = {data.train[i]["tokens"].tobytes() for i in range(len(data.train))}
    (batch,) = take(train_batches(data.train, 8, seed=0), 1)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == dict.fromkeys(
        ("tokens", "targets", "segment_ids", "positions"), ((8, 32), np.dtype(np.int32))
    )
    assert {row.tobytes() for row in batch["tokens"]} <= windows


def test_an_epoch_sees_every_window_once_and_the_next_in_another_order(data):
    count, size = len(data.train), 8
    batches = take(train_batches(data.train, size, seed=0), 2 * count // size + 1)
    rows = [row.tobytes() for batch in batches for row in batch["tokens"]]
    first, second = rows[:count], rows[count : 2 * count]
    assert sorted(first) == sorted(second) == sorted(data.train[i]["tokens"].tobytes() for i in range(count))
    assert first != second


def test_seeds_give_different_orders_and_the_same_seed_the_same(data):
    a, b, c = (take(train_batches(data.train, 8, seed=seed), 3) for seed in (1, 1, 2))
    np.testing.assert_equal(a, b)
    assert any((x["tokens"] != y["tokens"]).any() for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("saved_at", range(7))
def test_resume_is_exact_from_every_step(data, saved_at):
    expected = take(train_batches(data.train, 8, seed=3), 10)
    first = train_batches(data.train, 8, seed=3)
    take(first, saved_at)
    state = json.loads(json.dumps(first.get_state()))
    resumed = train_batches(data.train, 8, seed=3)
    next(resumed)  # a state also replaces where the stream stands
    resumed.set_state(state)
    np.testing.assert_equal(take(resumed, 10 - saved_at), expected[saved_at:])
    np.testing.assert_equal(take(train_batches(data.train, 8, seed=3, start_step=saved_at), 1), [expected[saved_at]])


def quarters(count):
    """The rows of a batch of 8 on each of `count` processes; dealt out in turn, as a torus of chips may have it."""
    return [range(index, 8, count) for index in range(count)]


def dealt(parts):
    """The global batch of the processes' parts."""
    return {name: np.stack([p[name] for p in parts], axis=1).reshape(8, -1) for name in parts[0]}


def test_processes_assemble_rows_of_the_same_global_batches(data):
    steps = len(data.train) // 8 + 2  # across an epoch's end
    expected = take(train_batches(data.train, 8, seed=5), steps)
    for count in (1, 2, 4):
        parts = [take(train_batches(data.train, 8, 5, rows), steps) for rows in quarters(count)]
        np.testing.assert_equal([dealt(part) for part in zip(*parts, strict=True)], expected)


def test_resume_with_another_number_of_processes(data):
    expected = take(train_batches(data.train, 8, seed=5), 9)
    two = [train_batches(data.train, 8, 5, rows) for rows in quarters(2)]
    for batches in two:
        take(batches, 4)
    states = [batches.get_state() for batches in two]
    assert states[0] == states[1]
    four = [train_batches(data.train, 8, 5, rows) for rows in quarters(4)]
    for batches in four:
        batches.set_state(states[0])
    parts = [take(batches, 5) for batches in four]
    np.testing.assert_equal([dealt(part) for part in zip(*parts, strict=True)], expected[4:])


@pytest.mark.slow
def test_worker_processes_do_not_change_the_stream(data):
    expected = take(train_batches(data.train, 8, seed=5), 6)
    batches = train_batches(data.train, 8, seed=5, worker_count=1)
    np.testing.assert_equal(take(batches, 3), expected[:3])
    assert batches.get_state() == {"next_step": 3}
    np.testing.assert_equal(take(train_batches(data.train, 8, seed=5, worker_count=2, start_step=3), 3), expected[3:])


def test_eval_batches_cover_the_hold_out_in_order(data):
    batches = list(eval_batches(data.validation, 8))
    count = len(data.validation)
    assert len(batches) == -(-count // 8) and count % 8
    rows = joined(batches)
    for name in rows:
        np.testing.assert_array_equal(rows[name][:count], [data.validation[i][name] for i in range(count)])
    assert (rows["segment_ids"][count:] == 0).all() and (rows["targets"][count:] == -1).all()
    # Every token of the hold-out but the documents' first is asked for exactly once, also across the windows' cuts.
    assert (rows["targets"] >= 0).sum() == data.validation.stream.num_tokens - data.validation.stream.num_documents


def test_eval_batches_limit(data):
    some = list(eval_batches(data.validation, 8, max_batches=2))
    spread = [i * len(data.validation) // 16 for i in range(16)]
    assert len(some) == 2 and len(set(spread)) == 16 and spread[-1] > len(data.validation) * 0.9
    np.testing.assert_array_equal(joined(some)["tokens"], [data.validation[i]["tokens"] for i in spread])


def test_bad_batch_sizes(data, config):
    with pytest.raises(ConfigError, match=r"data.batch_size=100000 exceeds the \d+ training windows of 32 tokens"):
        train_batches(data.train, 100_000, 0)
    with pytest.raises(ConfigError, match=r"data.batch_size=100000 exceeds"):
        load_data(dataclasses.replace(config, batch_size=100_000), 400, log=lambda _: None)
    with pytest.raises(ConfigError, match=r"data.seed=-1"):
        train_batches(data.train, 8, -1)
