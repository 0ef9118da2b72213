"""N-gram hashing against a slow reference in Python integers."""

import json
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engram_jax.config import ConfigError, EngramConfig
from engram_jax.memory import hashing
from engram_jax.memory.compression import TokenMap, canonicalize_numpy
from engram_jax.memory.hashing import HashConstants, hash_constants, ngram_row_ids, ngram_row_ids_numpy
from engram_jax.registries import READERS
from engram_jax.sharding import MESH_AXES, make_mesh

pytestmark = pytest.mark.newest

T = 24  # one length for the random tests, so that each variant compiles once


def small_constants(variant: str) -> HashConstants:
    """Few ids and rows, so that random tokens meet pads, repeats and every head; the last layer is the second of two
    (over_encoding has one)."""
    over_encoding = variant == "over_encoding"
    config = EngramConfig(
        engram_variant=variant,  # type: ignore[arg-type]
        engram_layer_ids=(0,) if over_encoding else (1, 3),
        engram_kernel_size=0 if over_encoding else 4,
        engram_max_ngram_size=4,
        engram_n_heads=3,
        engram_vocab_size=(50, 7, 1000),
        engram_pad_token_id=5,
        engram_seed=11,
    )
    return hash_constants(config, TokenMap.identity(20))


def reference_row_ids(constants: HashConstants, layer_id: int, ids, segments, resets: bool) -> np.ndarray:
    """The definition, position by position in Python integers, for one row of tokens."""
    layer = constants.layer_ids.index(layer_id)
    rows = []
    for t in range(len(ids)):
        window, ended = [], False
        for s in range(len(constants.multipliers[layer])):
            older = t - s
            ended = ended or older < 0 or not 0 <= ids[older] < constants.vocab_size
            ended = ended or segments[older] != segments[t] or (resets and s > 0 and ids[older] == constants.pad_id)
            window.append(constants.pad_id if ended else int(ids[older]))
        heads, offset = [], 0
        for order, primes in enumerate(constants.primes[layer], start=2):
            mix = 0
            for token, multiplier in zip(window[:order], constants.multipliers[layer], strict=False):
                mix = mix + token * multiplier if constants.variant == "over_encoding" else mix ^ token * multiplier
            for prime in primes:
                heads.append(offset + mix % prime)
                offset += prime
        rows.append(heads)
    return np.array(rows)


# --- NumPy and jax forms against the definition ---


@pytest.mark.parametrize("variant", READERS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_rows_equal_the_definition(variant, seed):
    rng, constants = np.random.default_rng(seed), small_constants(variant)
    ids = rng.integers(-1, 22, (3, T)).astype(np.int32)  # 20 and 21 are no ids: blocked, as -1 is
    segments = np.sort(rng.integers(0, 5, (3, T)), axis=-1).astype(np.int32)
    resets = variant == "qwen_ple"
    for layer_id in constants.layer_ids:
        expected = np.array(
            [reference_row_ids(constants, layer_id, *row, resets) for row in zip(ids, segments, strict=True)]
        )
        on_host = ngram_row_ids_numpy(constants, layer_id, ids, segments)
        on_device = jitted(constants, layer_id, ids, segments)
        assert on_host.dtype == on_device.dtype == np.int32
        assert np.array_equal(on_host, expected)
        assert np.array_equal(on_device, expected)


jitted = jax.jit(ngram_row_ids, static_argnums=(0, 1), static_argnames="with_offsets")


def test_largest_numbers_stay_exact(rng):
    """Products next to 2^63 and a prime next to 2^31."""
    vocab_size = 2**31 - 1
    largest = (2**63 - 1) // vocab_size
    constants = HashConstants(
        variant="paper",
        token_map_sha256="",
        vocab_size=vocab_size,
        pad_id=0,
        layer_ids=(0,),
        multipliers=((largest, largest - 2, largest - 4),),
        primes=(((3, 5), (7, 2_147_483_629)),),
    )
    ids = vocab_size - 1 - rng.integers(0, 1000, T).astype(np.int32)
    expected = reference_row_ids(constants, 0, ids, np.zeros(T), resets=False)
    assert expected.max() > 2**30
    assert np.array_equal(ngram_row_ids_numpy(constants, 0, ids), expected)
    assert np.array_equal(jitted(constants, 0, ids), expected)


def test_rows_of_the_flat_table_are_remainders_plus_offsets(rng):
    constants = small_constants("paper")
    ids = rng.integers(0, 20, (2, T)).astype(np.int32)
    for hashes in (ngram_row_ids_numpy, jitted):
        rows = np.asarray(hashes(constants, 3, ids))
        remainders = np.asarray(hashes(constants, 3, ids, with_offsets=False))
        offsets, sizes = np.array(constants.offsets(3)), np.array(constants.head_rows(3))
        assert np.array_equal(rows, remainders + offsets)
        assert (remainders < sizes).all() and (remainders >= 0).all()
        assert rows.max() < constants.num_rows(3)


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (2, 3, 5), (0, 4)])
def test_any_batch_shape(shape, rng):
    constants = small_constants("deepseek_v41")
    ids = rng.integers(0, 20, shape).astype(np.int32)
    rows = ngram_row_ids_numpy(constants, 1, ids)
    assert rows.shape == (*shape, 9)
    assert np.array_equal(jitted(constants, 1, ids), rows)
    for one, row in zip(ids.reshape(-1, shape[-1]), rows.reshape(-1, shape[-1], 9), strict=True):
        assert np.array_equal(reference_row_ids(constants, 1, one, np.zeros(shape[-1]), resets=False), row)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.uint8])
def test_any_integer_dtype(dtype, rng):
    constants = small_constants("paper")
    ids, segments = rng.integers(0, 20, (2, 2, T))
    expected = ngram_row_ids_numpy(constants, 1, ids, segments)
    assert np.array_equal(ngram_row_ids_numpy(constants, 1, ids.astype(dtype), segments.astype(dtype)), expected)
    assert np.array_equal(ngram_row_ids(constants, 1, ids.astype(dtype), segments.astype(dtype)), expected)


def test_int64_stays_inside_transformations(rng):
    """With 64-bit types off, every way of tracing gives the host's ids and int32, and leaves the switch as it was."""
    assert not jax.config.jax_enable_x64
    constants = small_constants("paper")
    ids = rng.integers(0, 20, (4, T)).astype(np.int32)
    expected = ngram_row_ids_numpy(constants, 1, ids)
    rows_of = partial(ngram_row_ids, constants, 1)
    table = jnp.arange(constants.num_rows(1), dtype=jnp.float32)

    def loss(table, ids):
        def body(total, row):
            rows = rows_of(row)
            return total + (table[rows] ** 2).sum(), rows

        return jax.lax.scan(jax.checkpoint(body), jnp.float32(0), ids)

    (_, scanned), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, ids)
    traced = {
        "eager": rows_of(ids),
        "vmap": jax.vmap(rows_of)(ids),
        "jit(vmap(jit))": jax.jit(jax.vmap(jax.jit(rows_of)))(ids),
        "vmap(scan)": jax.vmap(lambda x: jax.lax.map(rows_of, x))(ids.reshape(2, 2, T)).reshape(expected.shape),
        "grad(scan(remat))": scanned,
    }
    for name, rows in traced.items():
        assert rows.dtype == jnp.int32, name
        assert np.array_equal(rows, expected), name
    counts = np.bincount(expected.ravel(), minlength=len(table))
    np.testing.assert_allclose(grads, 2 * counts * np.asarray(table), rtol=1e-6)
    assert jnp.arange(3).dtype == jnp.int32
    with jax.enable_x64(True):
        assert ngram_row_ids(constants, 1, ids).dtype == jnp.int32


def test_sharded_batches_stay_where_they_are(rng):
    constants = small_constants("paper")
    token_map = TokenMap(np.arange(30) % 20)
    raw = rng.integers(-1, 32, (8, T)).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (8, T)), axis=-1).astype(np.int32)
    expected = ngram_row_ids_numpy(constants, 3, canonicalize_numpy(token_map, raw), segments)

    @jax.jit
    def rows_of(raw, segments):
        return ngram_row_ids(constants, 3, hashing.canonicalize(token_map, raw), segments)

    mesh = make_mesh(data=4, fsdp=2)
    batch = P(MESH_AXES, None)
    with jax.set_mesh(mesh):
        on_mesh = [jax.device_put(x, NamedSharding(mesh, batch)) for x in (raw, segments)]
        rows = rows_of(*on_mesh)
        compiled = rows_of.lower(*on_mesh).compile().as_text()
        mapped = jax.shard_map(rows_of, in_specs=(batch, batch), out_specs=P(MESH_AXES, None, None))(*on_mesh)
    assert rows.sharding.spec == P(MESH_AXES, None, None)
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled)
    assert np.array_equal(rows, expected)
    assert np.array_equal(mapped, expected)


@pytest.mark.parametrize("shape", [(9,), (2, 3, 4)])
def test_canonical_ids_on_device_equal_the_hosts(shape, rng):
    token_map = TokenMap(np.append(rng.permutation(10), rng.integers(0, 10, 20)))
    raw = rng.integers(-5, 40, shape).astype(np.int32)
    on_device = jax.jit(hashing.canonicalize, static_argnums=0)(token_map, raw)
    assert on_device.dtype == jnp.int32
    assert np.array_equal(on_device, canonicalize_numpy(token_map, raw))


# --- where windows stop ---


@pytest.mark.parametrize("variant", READERS)
def test_packed_documents_hash_as_they_do_alone(variant, rng):
    constants = small_constants(variant)
    ids = rng.integers(6, 20, T).astype(np.int32)  # no pad among them: only the segments may stop a window
    starts = [0, 1, 3, 10, T]
    segments = np.repeat(np.arange(4), np.diff(starts)).astype(np.int32)
    layer = constants.layer_ids[0]
    alone = [ngram_row_ids_numpy(constants, layer, ids[a:b]) for a, b in pairwise(starts)]
    packed = np.asarray(jitted(constants, layer, ids, segments))
    assert np.array_equal(packed, np.concatenate(alone))
    across = np.asarray(jitted(constants, layer, ids))
    changed = np.flatnonzero((packed != across).any(axis=-1))
    assert changed.tolist() == [1, 2, 3, 4, 5, 10, 11, 12]  # the first N - 1 = 3 positions of every later document


def test_a_blocked_token_hides_itself_and_everything_older(rng):
    constants = small_constants("deepseek_v41")
    ids = rng.integers(6, 20, T).astype(np.int32)
    for blocked in (-1, -100, 20):
        ids[10] = blocked
        rows = np.asarray(jitted(constants, 1, ids))
        assert np.array_equal(rows[11:], ngram_row_ids_numpy(constants, 1, ids[11:]))
        assert np.array_equal(rows[:10], ngram_row_ids_numpy(constants, 1, ids[:10]))
        pads = np.full(4, constants.pad_id, np.int32)
        assert np.array_equal(rows[10], ngram_row_ids_numpy(constants, 1, pads)[3])


def test_only_qwen_windows_stop_at_eos(rng):
    ids = rng.integers(6, 20, T).astype(np.int32)
    ids[10] = 5  # the pad of small_constants: EOS for qwen_ple
    for variant in READERS:
        constants = small_constants(variant)
        layer = constants.layer_ids[0]
        rows = np.asarray(jitted(constants, layer, ids))
        after_eos = ngram_row_ids_numpy(constants, layer, ids[11:])
        assert np.array_equal(rows[11:], after_eos) == (variant == "qwen_ple")
        # The EOS itself still sees the document that it ends.
        assert not np.array_equal(rows[10], ngram_row_ids_numpy(constants, layer, ids[10:])[0])


# --- constants as data ---


def test_constants_survive_json():
    constants = small_constants("qwen_ple")
    restored = HashConstants.from_dict(json.loads(json.dumps(constants.to_dict())))
    assert restored == constants
    assert hash(restored) == hash(constants)
    assert hashing.differences(restored, constants) == []


def test_differences_name_every_field_and_both_values():
    config = EngramConfig(engram_layer_ids=(1, 3), engram_n_heads=1, engram_vocab_size=10)
    ours, theirs = hash_constants(config, TokenMap.identity(20)), hash_constants(config, TokenMap.identity(21))
    names = [line.split(":")[0] for line in hashing.differences(ours, theirs)]
    assert names == ["token_map_sha256", "vocab_size", "multipliers of layer 1", "multipliers of layer 3"]
    assert "vocab_size: 20 here, 21 there" in hashing.differences(ours, theirs)

    fewer = hash_constants(replace(config, engram_layer_ids=(1,)), TokenMap.identity(20))
    assert hashing.differences(ours, fewer)[0] == "layer_ids: (1, 3) here, (1,) there"
    other_rows = hash_constants(replace(config, engram_vocab_size=12), TokenMap.identity(20))
    assert hashing.differences(ours, other_rows)[0] == "primes of layer 1: ((11,), (13,)) here, ((13,), (17,)) there"


def test_saved_constants_of_another_form_are_an_error():
    saved = small_constants("paper").to_dict()
    with pytest.raises(ConfigError, match="pad_id"):
        HashConstants.from_dict({key: value for key, value in saved.items() if key != "pad_id"})
    with pytest.raises(ConfigError, match="variant='other'"):
        HashConstants.from_dict(saved | {"variant": "other"})
    with pytest.raises(ConfigError, match="overflow"):
        HashConstants.from_dict(saved | {"vocab_size": 10**6})


@pytest.mark.parametrize(
    ("change", "token_map", "message"),
    [
        ({"engram_pad_token_id": 20}, TokenMap.identity(20), r"engram_pad_token_id=20 .* 20 token ids"),
        ({"engram_vocab_size": 2**27}, TokenMap.identity(20), r"engram_vocab_size .* 2,14\d,\d{3},\d{3} rows"),
        ({"engram_seed": -1}, TokenMap.identity(20), r"engram_seed=-1"),
        ({"engram_variant": "qwen_ple"}, TokenMap(np.array([0, 0, 1])), r"engram_variant='qwen_ple'.*identity"),
        ({"engram_without": ("compression",)}, TokenMap(np.array([0, 0, 1])), r"without=\('compression',\).*identity"),
    ],
)
def test_configs_that_cannot_work(change, token_map, message):
    with pytest.raises(ConfigError, match=message):
        hash_constants(replace(EngramConfig(engram_layer_ids=(1,)), **change), token_map)


# --- parts left out ---


def test_without_compression_raw_ids_are_hashed():
    """The constants are those of a tokenizer that compresses nothing."""
    config = EngramConfig(engram_layer_ids=(1,), engram_vocab_size=50)
    without = replace(config, engram_without=("compression",))
    assert hashing.compresses_ids(config) and not hashing.compresses_ids(without)
    raw = TokenMap.identity(20)
    assert hash_constants(without, raw) == hash_constants(config, raw)


def mixes(constants: HashConstants, bigrams: np.ndarray) -> np.ndarray:
    newest, older = bigrams.T
    first, second = constants.multipliers[0][:2]
    return newest.astype(np.int64) * first ^ older.astype(np.int64) * second


def test_without_the_wide_hash_different_bigrams_share_every_head(rng):
    """MaxText's numbers (multipliers of 1..21,649 at V' = 99,187), and what they do to 200,000 bigrams of frequent ids:
    more than 1 in 100 has the mix, and so all rows, of another. 63 bits keep them all apart."""
    config = EngramConfig(engram_layer_ids=(1,), engram_vocab_size=20_011, engram_max_ngram_size=2)
    ids = TokenMap.identity(99_187)
    wide, narrow = (hash_constants(replace(config, engram_without=w), ids) for w in ((), ("wide_hash",)))
    assert narrow.primes == wide.primes
    assert all(0 < m <= 21_649 and m % 2 == 1 for m in narrow.multipliers[0])
    draw = np.random.default_rng(10_007).integers(0, 10_825, size=2)
    assert narrow.multipliers[0] == tuple(2 * draw + 1)

    flat = rng.choice(500 * 500, 200_000, replace=False)
    bigrams = np.stack([flat // 500, flat % 500], axis=1)
    assert mixes(narrow, bigrams).max() < 2**31
    assert len(np.unique(mixes(wide, bigrams))) == len(bigrams)
    _, place, count = np.unique(mixes(narrow, bigrams), return_inverse=True, return_counts=True)
    assert np.mean(count[place] > 1) > 0.01

    # Two of one mix, as tokens of a text: one row in every head there, and different ones under the wide hash.
    alike = bigrams[place == np.argmax(count)][:2]
    texts = alike[:, ::-1]  # the older token comes first
    rows_narrow, rows_wide = (ngram_row_ids_numpy(c, 1, texts)[:, 1] for c in (narrow, wide))
    np.testing.assert_array_equal(rows_narrow[0], rows_narrow[1])
    assert np.any(rows_wide[0] != rows_wide[1])
