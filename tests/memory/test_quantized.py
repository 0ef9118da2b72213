"""FP8 rows against NumPy: scales, codes, bytes, and a frozen table as an ordinary one."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from engram_jax.config import ConfigError, OptimizerConfig
from engram_jax.memory.quantized import FrozenFP8, dequantize, pack, quantize, unpack
from engram_jax.memory.table import TableState
from engram_jax.registries import ROW_OPTIMIZERS

pytestmark = pytest.mark.newest

TINY = 2.0**-126
E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)[:-1]  # the 127 magnitudes in the order of their bytes; 0x7F is NaN


def code_value(byte):
    """What an e4m3fn byte stands for, from its definition."""
    magnitude = np.nan if byte & 0x7F == 0x7F else E4M3[byte & 0x7F]
    return -magnitude if byte & 0x80 else magnitude


def oracle(block):
    """Scale and values of one finite block [32], float64: nearest code, ties to the even one."""
    amax, scale = np.abs(block).max(), TINY
    while amax / scale > 448:
        scale *= 2
    distance = np.abs(np.abs(block / scale)[:, None] - E4M3)
    even = np.arange(127) % 2
    nearest = np.lexsort((np.broadcast_to(even, distance.shape), distance), axis=-1)[:, 0]
    return scale, np.copysign(E4M3[nearest], block) * scale


def round_trip(rows):
    codes, scales = jax.jit(quantize)(jnp.asarray(rows))
    return np.asarray(codes), np.asarray(scales), np.asarray(jax.jit(dequantize)(codes, scales))


def rows_of_all_sizes(rng, rows=40, blocks=3):
    """Normal blocks of very different sizes, some values of each a thousandth of the others."""
    x = rng.normal(size=(rows, blocks, 32)) * np.exp2(rng.integers(-90, 110, (rows, blocks, 1)))
    return (x * np.where(rng.random(x.shape) < 0.3, 1e-3, 1)).reshape(rows, -1).astype(np.float32)


def test_scale_and_values_are_the_oracles():
    rows = rows_of_all_sizes(np.random.default_rng(0))
    codes, scales, values = round_trip(rows)
    assert codes.dtype == ml_dtypes.float8_e4m3fn and scales.dtype == np.uint8
    assert codes.shape == rows.shape and scales.shape == (40, 3)
    for r in range(len(rows)):
        for b in range(3):
            block = slice(32 * b, 32 * b + 32)
            scale, expected = oracle(rows[r, block].astype(np.float64))
            assert 2.0 ** (float(scales[r, b]) - 127) == scale
            np.testing.assert_array_equal(values[r, block], expected)


def test_error_bound():
    rows = rows_of_all_sizes(np.random.default_rng(1)).astype(np.float64)
    _, scales, values = round_trip(np.float32(rows))
    scale = np.repeat(np.exp2(scales.astype(np.float64) - 127), 32, axis=1)
    error = np.abs(values - rows)
    assert np.all(error <= np.maximum(np.abs(rows) / 16, scale / 1024))
    amax = np.repeat(np.abs(rows).reshape(40, 3, 32).max(-1), 32, axis=1)
    assert np.all(scale / 1024 < amax / 2**17)


@pytest.mark.parametrize("exponent", [-100, -7, 0, 60])
def test_representable_rows_come_back_exactly(exponent):
    """All 254 finite codes; a block that reaches 448 keeps its scale, as every power of two times it does."""
    values = np.array([code_value(b) for b in range(256) if b & 0x7F != 0x7F])
    blocks = [np.concatenate([[448], values[i : i + 31]]) for i in range(0, 248, 31)]
    rows = (np.concatenate(blocks) * 2.0**exponent).astype(np.float32)[None]
    codes, scales, back = round_trip(rows)
    np.testing.assert_array_equal(back, rows)
    np.testing.assert_array_equal(scales, 127 + exponent)
    again, _, _ = round_trip(back)
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize(("amax", "byte"), [(448, 127), (np.nextafter(np.float32(448), np.float32(449)), 128)])
def test_the_scale_doubles_just_beyond_448(amax, byte):
    rows = np.zeros((1, 32), np.float32)
    rows[0, 5] = amax
    codes, scales, back = round_trip(rows)
    assert scales[0, 0] == byte
    assert back[0, 5] == 448 and code_value(int(codes.view(np.uint8)[0, 5])) == (448 if byte == 127 else 224)


def test_zeros_tiny_and_huge_blocks():
    rows = np.zeros((6, 32), np.float32)
    rows[1], rows[2], rows[3], rows[4] = -0.0, 1e-40, 1.8 * 2.0**127, 3 * TINY
    rows[5] = np.finfo(np.float32).max
    _, scales, values = round_trip(rows)
    np.testing.assert_array_equal(values[:2], 0)
    np.testing.assert_array_equal(scales[:3], 1)
    assert np.all(np.abs(values[2] - np.float64(1e-40)) < TINY)  # a subnormal may read as zero
    np.testing.assert_array_equal(scales[3], 127 + 120)  # 448 * 2^119 = 1.75 * 2^127 is too small
    np.testing.assert_array_equal(values[3], 1.75 * 2.0**127)
    np.testing.assert_array_equal(values[4], 3 * TINY)
    np.testing.assert_array_equal(values[5], np.inf)  # the nearest code is 2^128


def test_nan_and_infinities_become_nan_by_themselves():
    rng = np.random.default_rng(2)
    clean = rng.normal(size=(1, 64)).astype(np.float32)
    dirty, where = clean.copy(), [3, 17, 40]
    clean[0, where] = 0
    dirty[0, where] = [np.nan, np.inf, -np.inf]
    _, scales, values = round_trip(dirty)
    _, clean_scales, clean_values = round_trip(clean)
    assert np.all(np.isnan(values[0, where]))
    np.testing.assert_array_equal(scales, clean_scales)
    np.testing.assert_array_equal(np.delete(values, where, axis=1), np.delete(clean_values, where, axis=1))


def test_rows_built_by_hand_from_bytes():
    """Every code under every scale, straight from the formats' definitions (field's pitfall: the wrong block rescales
    without an error)."""
    codes = np.arange(256, dtype=np.uint8)
    scales = np.arange(256, dtype=np.uint8)
    packed = np.concatenate([np.tile(codes, (32, 1)), scales.reshape(32, 8)], axis=1)
    assert packed.shape == (32, 264)
    values = np.asarray(dequantize(*unpack(jnp.asarray(packed))))
    expected = np.array([code_value(int(c)) for c in codes])[None, :] * np.exp2(
        np.repeat(scales.reshape(32, 8).astype(np.float64), 32, axis=1) - 127
    )
    expected[31, 224:] = np.nan  # byte 255
    normal = (np.abs(expected) >= TINY) | (expected == 0)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(values[normal], expected.astype(np.float32)[normal])
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    assert np.all(np.abs(values[~normal & ~np.isnan(expected)]) < TINY)


def test_one_scale_covers_32_values():
    codes = jnp.ones((1, 96), jnp.float8_e4m3fn)
    values = dequantize(codes, jnp.uint8([[127, 130, 120]]))
    np.testing.assert_array_equal(values[0], np.repeat([1, 8, 2**-7], 32))


def test_packed_rows_are_codes_then_scales():
    codes, scales = quantize(jnp.asarray(rows_of_all_sizes(np.random.default_rng(3), 4, 8)))
    packed = pack(codes, scales)
    assert packed.shape == (4, 264) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed[:, :256], np.asarray(codes).view(np.uint8))
    np.testing.assert_array_equal(packed[:, 256:], scales)
    again = unpack(packed)
    np.testing.assert_array_equal(np.asarray(again[0]).view(np.uint8), np.asarray(codes).view(np.uint8))
    np.testing.assert_array_equal(again[1], scales)


def test_bfloat16_rows_quantise_like_float32_ones():
    rows = jnp.asarray(rows_of_all_sizes(np.random.default_rng(4)), jnp.bfloat16)
    ours, same = quantize(rows), quantize(rows.astype(jnp.float32))
    for a, b in zip(ours, same, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="engram_head_dim=80 is not a multiple of 32"):
        quantize(jnp.ones((2, 80)))
    with pytest.raises(ConfigError, match="engram_head_dim=80"):
        FrozenFP8().init(jnp.ones((2, 80)))
    with pytest.raises(ConfigError, match="256 bytes wide, not a multiple of 33"):
        unpack(jnp.ones((2, 256), jnp.uint8))


def test_a_frozen_table_is_an_ordinary_one():
    """Rows and scales gathered together, unused places filled with zeros, read back as the rows they were."""
    rows = jnp.asarray(rows_of_all_sizes(np.random.default_rng(5)))
    codes, scales = quantize(rows)
    table = TableState(codes, {"scale": scales}, jnp.zeros(len(rows), jnp.int32))
    rule, ids = FrozenFP8(), jnp.int32([3, 0, 39, 40])

    @jax.jit
    def fetch(table, ids):
        held = jax.tree.map(lambda a: a.at[ids].get(mode="fill", fill_value=0), table)
        return rule.read(held.rows, held.slots, jnp.int32(0))[0]

    fetched = np.asarray(fetch(table, ids))
    np.testing.assert_array_equal(fetched[:3], np.asarray(dequantize(codes, scales))[np.array([3, 0, 39])])
    np.testing.assert_array_equal(fetched[3], 0)
    assert not rule.whole_table
    new = rule.init(codes)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == {"scale": (scales.shape, scales.dtype)}
    np.testing.assert_array_equal(rule.read(jnp.ones_like(codes), new, jnp.int32(0))[0], 1)


def test_frozen_rows_refuse_training():
    rule, codes = FrozenFP8(), jnp.ones((1, 32), jnp.float8_e4m3fn)
    with pytest.raises(ConfigError, match="frozen"):
        rule.update(codes, rule.init(codes), jnp.ones((1, 32)), jnp.int32(0))
    with pytest.raises(ConfigError, match="frozen"):
        FrozenFP8.create(OptimizerConfig(), np.ones(1))
    assert FrozenFP8 not in ROW_OPTIMIZERS.values()
