"""N-gram hashing: which rows of a layer's table a token reads (paper 2.2), exact to 64 bits on host and device.

The last n tokens up to a position (its n-gram of order n) are mixed into one number, which the K heads of the order
share. Head k takes the remainder of this number by its own prime. The tables of the heads stand one after the other in
one flat table per layer:

    mix_n = (x_t * m_0) xor (x_{t-1} * m_1) xor ... xor (x_{t-n+1} * m_{n-1}),   row = offset_{n,k} + mix_n mod p_{n,k}

Ids are below V' and multipliers below 2^63 / V', so no product overflows and int64 is exact. OverEncoding reads the
n-gram as a number to base V instead: mix_n = x_t + x_{t-1} V + ... + x_{t-n+1} V^{n-1}, which is exact for V^N < 2^63.

Shapes: T tokens of a row (the last dim), ... any batch shape, N largest order, K heads per order,
H = (N - 1) K rows per token (order-major, then head), V raw and V' canonical ids.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import EngramConfig, require
from engram_jax.memory.compression import TokenMap
from engram_jax.registries import HASHES, READERS

INT64_MAX = 2**63 - 1
INT31_MAX = 2**31 - 1
"""Bound of the mix without `wide_hash`, as in MaxText: its multipliers are at most 21,649 at V' = 99,187. N-grams with
equal mixes share their rows in every head (tests/memory/test_hashing.py counts them)."""
SEED_STEP = 10_007
"""Distance between the seeds of two layers, in both published draws."""


# --- the published variants ---


def pcg64_draw(seed: int, bound: int, count: int) -> list[int]:
    """DeepSeek's draw: `count` numbers below `bound` from NumPy's default generator."""
    return np.random.default_rng(seed).integers(0, bound, size=count, dtype=np.int64).tolist()


def splitmix64_draw(seed: int, bound: int, count: int) -> list[int]:
    """Qwen's draw: outputs 2..count+1 of the splitmix64 sequence started at `seed`, modulo `bound`."""
    mask, gamma, drawn = 2**64 - 1, 0x9E3779B97F4A7C15, []
    for i in range(count):
        z = (seed + gamma * (i + 2)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        drawn.append((z ^ (z >> 31)) % bound)
    return drawn


def odd_multipliers(draw: Callable[[int, int, int], list[int]]) -> Callable[[int, int, int, int], tuple[int, ...]]:
    """Multipliers 2 r + 1 of drawn numbers r, all below `largest_mix` / V'."""

    def multipliers(seed: int, largest_mix: int, vocab_size: int, count: int) -> tuple[int, ...]:
        return tuple(2 * r + 1 for r in draw(seed, max(1, largest_mix // vocab_size // 2), count))

    return multipliers


def powers(seed: int, largest_mix: int, vocab_size: int, count: int) -> tuple[int, ...]:
    """Multipliers 1, V, V^2, ..., without a draw."""
    return tuple(vocab_size**i for i in range(count))


@dataclass(frozen=True)
class HashVariant:
    """A hash of n-grams: the choices in which published hashes differ. All of them search for primes in the same way.

    OverEncoding (Huang et al. 2025, arXiv 2501.16975) calls its heads slices. Their sizes are distinct numbers near m
    (m + 2i + 1 for slice i in LongCat's port). Here they are primes like those of all heads, which share no factor
    with V.
    """

    compresses_ids: bool
    """True: canonical ids are hashed (`TokenMap.from_tokenizer`). False: raw ids (`TokenMap.identity`)."""
    multipliers: Callable[[int, int, int, int], tuple[int, ...]]
    """(seed, largest mix, V', N) -> m_0 ... m_{N-1}."""
    seeds_by_position: bool
    """True: a layer's seed depends on its index in engram_layer_ids. False: on its block number."""
    resets_at_pad: bool
    """True: a window ends at a pad token, so that older tokens are hidden. Qwen's pad is its EOS, so the next token has
    the same n-grams whether the EOS or padding stands before it."""
    combine: Callable[[Any, Any], Any] = operator.xor
    """Combines the mix of newer positions with the next older position."""
    pads_with_zero: bool = False
    """True: positions before the start of a window have id 0 instead of engram_pad_token_id."""


DEEPSEEK = HashVariant(
    compresses_ids=True, multipliers=odd_multipliers(pcg64_draw), seeds_by_position=False, resets_at_pad=False
)
QWEN = HashVariant(
    compresses_ids=False, multipliers=odd_multipliers(splitmix64_draw), seeds_by_position=True, resets_at_pad=True
)
OVER_ENCODING = HashVariant(
    compresses_ids=False,
    multipliers=powers,
    seeds_by_position=False,
    resets_at_pad=False,
    combine=operator.add,
    pads_with_zero=True,
)


def hash_of(reader: str) -> HashVariant:
    """The hash of the reader that `engram_variant` names."""
    return HASHES[READERS[reader].hash]


def compresses_ids(config: EngramConfig) -> bool:
    """Whether a model hashes canonical ids and therefore needs its tokenizer's map (`TokenMap.from_tokenizer`)."""
    return hash_of(config.engram_variant).compresses_ids and "compression" not in config.engram_without


# --- constants ---


@dataclass(frozen=True)
class HashConstants:
    """The numbers that determine the rows of every n-gram: Python ints, hashable, stored in checkpoints.

    Raises:
      ConfigError: products would overflow 64 bits, or row ids 32 bits.
    """

    variant: str
    token_map_sha256: str
    vocab_size: int
    """Number of ids that are hashed, V': canonical ids, or raw ids for a hash without compression."""
    pad_id: int
    """The (canonical) id of positions before the start of a window."""
    layer_ids: tuple[int, ...]
    multipliers: tuple[tuple[int, ...], ...]
    """[layer][N]"""
    primes: tuple[tuple[tuple[int, ...], ...], ...]
    """[layer][N - 1][K]: rows of each head."""

    def __post_init__(self):
        require(self.variant in READERS, f"variant={self.variant!r} is not one of {', '.join(READERS)}.")
        require(0 <= self.pad_id < self.vocab_size, f"pad_id={self.pad_id} is not one of {self.vocab_size} ids.")
        for layer_id, multipliers in zip(self.layer_ids, self.multipliers, strict=True):
            require(
                all(0 < m <= INT64_MAX // self.vocab_size for m in multipliers),
                f"multipliers={multipliers} of layer {layer_id} overflow 64 bits with {self.vocab_size} ids: "
                "they were made for a smaller vocabulary, or engram_max_ngram_size is too large.",
            )
            require(
                self.num_rows(layer_id) < 2**31,
                f"engram_vocab_size gives layer {layer_id} {self.num_rows(layer_id):,} rows, and row ids are int32: "
                "choose it so that orders x heads x engram_vocab_size stays below 2,147,483,648.",
            )

    def head_rows(self, layer_id: int) -> tuple[int, ...]:
        """Rows of each of the H heads of a layer's table."""
        return tuple(itertools.chain.from_iterable(self.primes[self.layer_ids.index(layer_id)]))

    def num_rows(self, layer_id: int) -> int:
        """Rows of a layer's table."""
        return sum(self.head_rows(layer_id))

    def offsets(self, layer_id: int) -> tuple[int, ...]:
        """First row of each of the H heads in a layer's table."""
        return tuple(itertools.accumulate(self.head_rows(layer_id), initial=0))[:-1]

    def to_dict(self) -> dict[str, Any]:
        """The constants as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HashConstants:
        """Rebuilds `to_dict`'s output, also from JSON. Raises `ConfigError` if fields are missing or unknown."""
        names = {field.name for field in fields(cls)}
        require(set(values) == names, f"Hash constants need {sorted(names)}, got {sorted(values)}.")

        def frozen(value: Any) -> Any:
            return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value

        return cls(**{key: frozen(value) for key, value in values.items()})


def hash_constants(config: EngramConfig, token_map: TokenMap) -> HashConstants:
    """Multipliers and primes of a config, by the published procedure of its hash.

    Raises:
      ConfigError: the pad id lies outside the vocabulary, the map compresses ids and the config hashes raw ids, or
        there are too many rows for int32 row ids.
    """
    variant = hash_of(config.engram_variant)
    require(
        compresses_ids(config) or token_map == TokenMap.identity(token_map.vocab_size),
        f"engram_variant={config.engram_variant!r} with engram_without={config.engram_without} hashes raw token ids: "
        "use TokenMap.identity.",
    )
    pad = config.engram_pad_token_id
    require(
        0 <= pad < token_map.vocab_size,
        f"engram_pad_token_id={pad} is not one of the tokenizer's {token_map.vocab_size} token ids.",
    )
    require(config.engram_seed >= 0, f"engram_seed={config.engram_seed} must be 0 or positive.")
    largest_mix = INT31_MAX if "wide_hash" in config.engram_without else INT64_MAX
    keys = range(len(config.engram_layer_ids)) if variant.seeds_by_position else config.engram_layer_ids
    seeds = [config.engram_seed + SEED_STEP * key for key in keys]
    used: set[int] = set()
    return HashConstants(
        variant=config.engram_variant,
        token_map_sha256=token_map.sha256,
        vocab_size=token_map.size,
        pad_id=0 if variant.pads_with_zero else int(token_map.canonical_ids[pad]),
        layer_ids=config.engram_layer_ids,
        multipliers=tuple(
            variant.multipliers(seed, largest_mix, token_map.size, config.engram_max_ngram_size) for seed in seeds
        ),
        primes=tuple(
            tuple(
                tuple(itertools.islice(unused_primes(base, used), config.engram_n_heads))
                for base in config.vocab_size_per_order
            )
            for _ in config.engram_layer_ids
        ),
    )


def differences(ours: HashConstants, theirs: HashConstants) -> list[str]:
    """The constants in which two models differ, one line each: `pad_id: 2 here, 0 there`. Empty: their rows agree."""

    def leaves(c: HashConstants) -> dict[str, Any]:
        by_layer = {
            f"{name} of layer {layer_id}": value
            for layer_id, *values in zip(c.layer_ids, c.multipliers, c.primes, strict=True)
            for name, value in zip(("multipliers", "primes"), values, strict=True)
        }
        names = ("variant", "token_map_sha256", "vocab_size", "pad_id", "layer_ids")
        return {name: getattr(c, name) for name in names} | by_layer

    a, b = leaves(ours), leaves(theirs)
    return [f"{name}: {a.get(name)} here, {b.get(name)} there" for name in a | b if a.get(name) != b.get(name)]


def unused_primes(start: int, used: set[int]) -> Iterator[int]:
    """Ascending primes from `start` on that are not in `used`, each added to `used`.

    Restarted for every (layer, order) with one shared set, this is DeepSeek's search. With one base for all orders, the
    search goes on where the last head stopped, which gives Qwen's n-th prime after base - 1.
    """
    for candidate in itertools.count(start):
        if candidate not in used and is_prime(candidate):
            used.add(candidate)
            yield candidate


def is_prime(n: int) -> bool:
    """Miller-Rabin with the first twelve primes as bases: deterministic below 3.1e23."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        squares = [pow(base, odd << i, n) for i in range(twos)]
        if squares[0] != 1 and n - 1 not in squares:
            return False
    return True


# --- ids ---


def canonicalize(token_map: TokenMap, token_ids: jax.Array) -> jax.Array:
    """Canonical ids int32 [...] of raw token ids, on device: tokens of equal normalized text share an id (appendix C).

    Args:
      token_map: from `TokenMap.from_tokenizer`.
      token_ids: any shape and integer dtype; the result is sharded as they are. Negative ids (blocked) stay negative,
        and ids from V on become -1. `compression.canonicalize_numpy` is the same in NumPy.
    """
    raw = jnp.asarray(token_ids).astype(jnp.int32)
    inside = (raw >= 0) & (raw < token_map.vocab_size)
    table_V = jnp.asarray(token_map.canonical_ids)
    # Within an explicit mesh, a gather by sharded ids needs out_sharding; elsewhere it has no effect.
    mapped = table_V.at[jnp.where(inside, raw, 0)].get(out_sharding=jax.typeof(raw).sharding)
    return jnp.where(inside, mapped, jnp.minimum(raw, -1))


def ngram_row_ids_numpy(
    constants: HashConstants,
    layer_id: int,
    token_ids: np.ndarray,
    segment_ids: np.ndarray | None = None,
    *,
    with_offsets: bool = True,
) -> np.ndarray:
    """Rows of a layer's table that every token reads, in NumPy.

    A window ends at the start of the row, where the segment id changes, and at a blocked token (an id outside
    0..V'-1), which is hidden too; qwen_ple windows also end at every EOS. Older positions count as the pad.

    Args:
      constants: from `hash_constants`.
      layer_id: one of `constants.layer_ids`.
      token_ids: canonical ids [..., T] (`canonicalize`), any integer dtype.
      segment_ids: [..., T], the document of each token. None: the row is one document.
      with_offsets: False gives remainders, in 0..p-1 of each head, instead of rows of the flat table.

    Returns:
      int32 [..., T, H]
    """
    segments = None if segment_ids is None else np.asarray(segment_ids)
    return _row_ids(np, constants, layer_id, np.asarray(token_ids), segments, with_offsets)


def ngram_row_ids(
    constants: HashConstants,
    layer_id: int,
    token_ids: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    with_offsets: bool = True,
) -> jax.Array:
    """Rows of a layer's table that every token reads, on device: int32 [..., T, H] (arXiv 2601.07372, section 2.2).

    Bit-equal to `ngram_row_ids_numpy`, also with `jax_enable_x64` off. Batch dims keep their sharding.

    Args:
      constants: from `hash_constants`.
      layer_id: one of `constants.layer_ids`.
      token_ids: canonical ids [..., T] (`canonicalize`), any integer dtype.
      segment_ids: [..., T], the document of each token; windows stop between documents. None: the row is one document.
      with_offsets: False gives remainders, in 0..p-1 of each head, instead of rows of the flat table.
    """
    # int64 under a local switch instead of two uint32 limbs. On jax 0.10.2 and 0.12.0 it stays exact and no 64-bit
    # array leaves it under jit, vmap of jit, scan, remat, grad, cond, shard_map, explicit meshes and re-evaluated
    # jaxprs. It allows primes up to 2^31; limbs would need p < 2^25 for a short reduction.
    with jax.enable_x64(True):
        segments = None if segment_ids is None else jnp.asarray(segment_ids)
        return _row_ids(jnp, constants, layer_id, jnp.asarray(token_ids), segments, with_offsets)


def _row_ids(
    xp: ModuleType, constants: HashConstants, layer_id: int, token_ids: Any, segment_ids: Any, with_offsets: bool
) -> Any:
    """The one definition, in NumPy or jax.numpy (`xp`); elementwise along all dims but T."""
    layer, variant = constants.layer_ids.index(layer_id), hash_of(constants.variant)
    reset_id = constants.pad_id if variant.resets_at_pad else -1  # -1 blocks in any case
    offsets = np.reshape(constants.offsets(layer_id), np.shape(constants.primes[layer]))
    ids = token_ids.astype(xp.int64)
    segments = None if segment_ids is None else segment_ids.astype(xp.int64)

    def look_back(x: Any, steps: int) -> Any:  # x[..., t - steps]; -1, which blocks, before the row's start
        return xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(steps, 0)], constant_values=-1)[..., : x.shape[-1]]

    visible, mix, rows = True, 0, []
    for steps, multiplier in enumerate(constants.multipliers[layer]):
        older = look_back(ids, steps)
        visible = visible & (older >= 0) & (older < constants.vocab_size)
        if steps > 0:
            visible &= older != reset_id
            if segments is not None:
                visible &= look_back(segments, steps) == segments
        mix = variant.combine(mix, xp.where(visible, older, constants.pad_id) * multiplier)
        if steps > 0:
            to_heads = (1,) * ids.ndim + (-1,)
            primes = xp.asarray(constants.primes[layer][steps - 1], xp.int64).reshape(to_heads)
            shift = xp.asarray(offsets[steps - 1], xp.int64).reshape(to_heads)
            rows.append(mix[..., None] % primes + (shift if with_offsets else 0))
    return xp.concatenate(rows, axis=-1).astype(xp.int32)
