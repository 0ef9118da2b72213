"""What the memory costs: reader and table update against the matrix products they cannot do without.

    python -m benchmarks.memory [--rows 100000 1000000 4000000 10000000] [--repeats 7]

All times are medians of rounds in which every entry is timed in turn, so that the ratios hold on a machine whose speed
drifts. Sizes: batch 8 x 512 tokens, hidden 512 in 4 streams, 2 orders x 8 heads, rows of 32, float32.

Legend: B batch, T seq, M streams, D hidden size, E memory width, H rows per token, d row width.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.common import header
from engram_jax.config import EngramConfig, ModelConfig
from engram_jax.layers.engram import EngramReader
from engram_jax.memory.compression import TokenMap
from engram_jax.memory.description import MemoryState
from engram_jax.memory.row_optimizers import CatchUpAdam, DenseAdam
from engram_jax.memory.store import MemoryStore

B, T, VOCAB = 8, 512, 100_000
RATES = np.full(1000, 1e-3)


@dataclass(frozen=True)
class Options:
    rows: tuple[int, ...] = (100_000, 1_000_000, 4_000_000, 10_000_000)
    """Table sizes, in rows of 32."""
    repeats: int = 7
    seed: int = 0


def rounds(entries: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each entry; entries take turns."""
    for run in entries.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(repeats):
        for name, run in entries.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def model_config(num_rows: int) -> ModelConfig:
    memory = EngramConfig(engram_layer_ids=(0,), engram_head_dim=32, engram_vocab_size=num_rows // 16)
    return ModelConfig(hidden_size=512, hc_mult=4, dtype="float32", engram=memory)


def zipf_tokens(seed: int) -> jax.Array:
    """Frequencies as in natural text: token id = frequency rank."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.minimum(rng.zipf(1.2, (B, T)) - 1, VOCAB - 1), jnp.int32)


class Donated:
    """A jitted step that eats its state: each call goes on from the last one's."""

    def __init__(self, step: Callable[..., Any], state: Any, *args: Any):
        self.step, self.state, self.args = jax.jit(step, donate_argnums=0), state, args

    def __call__(self) -> Any:
        self.state, *rest = self.step(self.state, *self.args)
        return self.state, rest


def matrix_products(config: ModelConfig, key: jax.Array) -> Callable[[], Any]:
    """The reader's projection, and its two gradients: the part that no implementation can leave out."""
    E, out = config.engram.memory_dim, (config.hc_mult + 1) * config.hidden_size
    x, w, ct = (jax.random.normal(key, shape) for shape in ((B * T, E), (E, out), (B * T, out)))
    return lambda step=jax.jit(lambda x, w, ct: (x @ w, ct @ w.T, x.T @ ct)): step(x, w, ct)


def reader_loss(graphdef: nnx.GraphDef, params: Any, x: jax.Array, rows: jax.Array, ct: jax.Array) -> jax.Array:
    return jnp.vdot(nnx.merge(graphdef, params)(x, rows), ct)


def grouped_convolution_loss(
    graphdef: nnx.GraphDef, params: Any, x: jax.Array, rows: jax.Array, ct: jax.Array
) -> jax.Array:
    """The same reader as commonly written: normalised copies, and a depthwise convolution over M * D channels."""
    reader = nnx.merge(graphdef, params)

    def norm(a, gain_MD):
        return a * jax.lax.rsqrt(jnp.mean(a * a, -1, keepdims=True) + 1e-20) * gain_MD[None, None]

    projected = jnp.einsum("bte,emd->btmd", rows.reshape(B, T, -1), reader.key_value_emd[...])
    key, value = projected[:, :, :-1], projected[:, :, -1:]
    score = jnp.sum(norm(x, reader.query_norm[...]) * norm(key, reader.key_norm[...]), -1, keepdims=True)
    score = score * x.shape[-1] ** -0.5
    gated = jax.nn.sigmoid(jnp.sign(score) * jnp.sqrt(jnp.maximum(jnp.abs(score), 1e-6))) * value
    channels = gated.shape[2] * gated.shape[3]
    mixed = jax.lax.conv_general_dilated(
        norm(gated, reader.conv_norm[...]).reshape(B, T, channels),
        reader.conv_kmd[...].reshape(-1, 1, channels),
        window_strides=(1,),
        padding=[(9, 0)],
        rhs_dilation=(3,),
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=channels,
    )
    return jnp.vdot(gated + jax.nn.silu(mixed).reshape(gated.shape), ct)


def table_step(store: MemoryStore) -> Callable[[MemoryState, jax.Array, jax.Array], tuple[MemoryState, jax.Array]]:
    def step(state, tokens, grads):
        plan = store.plan(tokens)
        rows = store.fetch(state, plan, 1)
        # rows enter the gradient, so that the fetch is not optimized away
        new = store.update(state, plan, store.reduce(plan, {"0": grads + 1e-6 * rows["0"]}), 1)
        return new, rows["0"]

    return step


def reader_and_table_step(store: MemoryStore, graphdef: nnx.GraphDef) -> Callable[..., tuple[MemoryState, Any]]:
    def step(state, tokens, params, x, ct):
        plan = store.plan(tokens)
        rows = store.fetch(state, plan, 1)["0"]
        grads = jax.grad(reader_loss, argnums=(1, 2, 3))(graphdef, params, x, rows, ct)
        return store.update(state, plan, store.reduce(plan, {"0": grads[2]}), 1), grads[:2]

    return step


def main(options: Options) -> None:
    header()
    key, tokens = jax.random.key(options.seed), zipf_tokens(options.seed)
    config = model_config(min(4_000_000, max(options.rows)))
    graphdef, params = nnx.split(EngramReader(config, rngs=nnx.Rngs(options.seed)))
    x, ct = (jax.random.normal(jax.random.fold_in(key, i), (B, T, 4, 512)) for i in range(2))
    rows = jax.random.normal(key, (B, T, 16, 32))
    products = matrix_products(config, key)
    token_map = TokenMap.identity(VOCAB)

    def gradient(loss):
        step = jax.jit(lambda params, x, rows, ct: jax.grad(loss, argnums=(1, 2, 3))(graphdef, params, x, rows, ct))
        return lambda: step(params, x, rows, ct)

    store = MemoryStore.create(config.engram, token_map, CatchUpAdam(RATES))
    both = Donated(reader_and_table_step(store, graphdef), store.init(key), tokens, params, x, ct)
    names = ("three matrix products", "reader, forward and backward", "the same, grouped convolution", "reader + table")
    runs = (products, gradient(reader_loss), gradient(grouped_convolution_loss), both)
    times = rounds(dict(zip(names, runs, strict=True)), options.repeats)
    print(f"\nReader ({store.num_rows('0'):,} rows):")
    for name, seconds in times.items():
        print(f"  {name:32} {seconds * 1e3:9.1f} ms   {seconds / times[names[0]]:6.2f} x the products")
    del both, store, runs
    gc.collect()

    print("\nTable: plan, fetch, reduce and update of 65,536 lookups")
    grads, first = jax.random.normal(key, (B, T, 16, 32)), None
    for num_rows in options.rows:
        entries = {"products": products}
        for name, optimizer in (("catch-up Adam", CatchUpAdam(RATES)), ("dense Adam", DenseAdam(RATES))):
            store = MemoryStore.create(model_config(num_rows).engram, token_map, optimizer)
            entries[name] = Donated(table_step(store), store.init(key), tokens, grads)
        times = rounds(entries, options.repeats)
        catch_up, dense = times["catch-up Adam"], times["dense Adam"]
        share = catch_up / times["products"]
        first = first or share
        print(
            f"  {num_rows:>11,} rows: catch-up Adam {catch_up * 1e3:7.1f} ms ({share:.2f} x the products, "
            f"{share / first:.2f} x the first), dense Adam {dense * 1e3:8.1f} ms ({dense / catch_up:.1f} x)"
        )
        del entries, store
        gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Options))
