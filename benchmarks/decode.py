"""What the memory costs at decode: tokens per second without it, with it on the device, and with it on the host.

    python -m benchmarks.decode [--rows 100000 1000000 10000000] [--batch_sizes 1 32] [--repeats 5]

Every entry decodes the same prompts with its own engine (inference/engine.py), weights untrained, ids drawn at
temperature 1 so that they, and the rows they read, are spread. Entries take turns within a round and the ratios are of
medians, so that they hold on a machine whose speed drifts. The paper's figures (section 6.4, a 100 B-parameter table
on the host, 4 B and 8 B dense backbones): -1.9 % and -2.8 %.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import jax
import tyro
from tokenizers import Tokenizer, models

from benchmarks.common import header
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, RunConfig, replace
from engram_jax.inference.engine import Engine
from engram_jax.inference.sampling import Sampling
from engram_jax.runs.parts import assemble

SIZES = {"cpu": (256, 6, 1024), "gpu": (2048, 24, 5632)}
"""Hidden size, blocks and feed-forward width: 7 M and 1.2 B parameters without embeddings."""


@dataclass(frozen=True)
class Options:
    rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Table sizes of each of the two Engram layers, in rows of 64."""
    batch_sizes: tuple[int, ...] = (1, 32)
    prompt: int = 32
    """Tokens of each prompt."""
    tokens: int = 64
    """New tokens of each sequence."""
    repeats: int = 5
    placements: tuple[Literal["device", "host"], ...] = ("device", "host")
    size: Literal["auto", "cpu", "gpu"] = "auto"
    """The backbone; auto: by the device."""
    seed: int = 0


def run_config(options: Options, num_rows: int) -> RunConfig:
    """A dense backbone with two Engram layers of `num_rows` rows each (0: none)."""
    on_cpu = jax.default_backend() == "cpu" if options.size == "auto" else options.size == "cpu"
    hidden, blocks, width = SIZES["cpu" if on_cpu else "gpu"]
    engram = EngramConfig()
    if num_rows:
        engram = EngramConfig(engram_layer_ids=(1, blocks // 2), engram_head_dim=64, engram_vocab_size=num_rows // 16)
    heads = max(hidden // 128, 1)
    attention = AttentionConfig(num_attention_heads=heads, kv_lora_rank=hidden // 4)
    dtype = "float32" if on_cpu else "bfloat16"
    model = ModelConfig(32_000, hidden, blocks, width, attention, engram=engram, hc_mult=1, dtype=dtype)
    run = RunConfig(model=model, data=replace(RunConfig().data, batch_size=1, seq_len=1024))
    # A table alone: no optimizer row per row, as in serving.
    return replace(run, optimizer__table_optimizer="rowwise_adagrad", train__mesh_data=1, optimizer__warmup_steps=1)


def engine(options: Options, num_rows: int, placement: str, batch_size: int) -> Engine:
    vocabulary = {f"t{i}": i for i in range(32_000)}
    config = replace(run_config(options, num_rows), memory__placement=placement)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    parts = assemble(config, tokenizer, jax.devices()[:1])
    with jax.set_mesh(parts.mesh):
        state = parts.init_state()
    return Engine(parts, state, batch_size, options.prompt + options.tokens, chunk=options.prompt)


def seconds(engine: Engine, options: Options, batch_size: int, seed: int) -> float:
    """Wall time of one round, prompts included."""
    prompts = [[(31 * i + 7 * j + seed) % 32_000 for j in range(options.prompt)] for i in range(batch_size)]
    start = time.perf_counter()
    made = engine.generate(prompts, Sampling(options.tokens, temperature=1.0, top_k=0, seed=seed))
    assert all(len(new) == options.tokens for new in made)
    return time.perf_counter() - start


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.decode", use_underscores=True)
    header()
    config = run_config(options, 0)
    print(f"backbone  hidden {config.model.hidden_size}, {config.model.num_hidden_layers} blocks, {config.model.dtype}")
    print(f"decoding  {options.tokens} tokens after {options.prompt}, medians of {options.repeats} rounds\n")
    print(f"{'batch':>5} {'rows':>11} {'placement':>9} {'tokens/s':>9} {'of no memory':>12} {'of device':>9}  spread")
    for batch_size in options.batch_sizes:
        for num_rows in options.rows:
            entries = {"none": engine(options, 0, "device", batch_size)}
            entries |= {p: engine(options, num_rows, p, batch_size) for p in options.placements}
            times: dict[str, list[float]] = {name: [] for name in entries}
            for repeat in range(-1, options.repeats):  # the first round compiles
                for name, one in entries.items():
                    took = seconds(one, options, batch_size, options.seed + repeat + 1)
                    if repeat >= 0:
                        times[name].append(took)
            middle = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                rate = batch_size * options.tokens / middle[name]
                of_device = f"{middle['device'] / middle[name]:9.3f}" if "device" in middle else " " * 9
                spread = f"{min(values) / middle[name]:.2f}..{max(values) / middle[name]:.2f}"
                rows = f"{num_rows:,}" if name != "none" else "-"
                print(
                    f"{batch_size:5} {rows:>11} {name:>9} {rate:9.0f} {middle['none'] / middle[name]:12.3f} "
                    f"{of_device}  {spread}",
                    flush=True,
                )
            entries.clear()
            gc.collect()


if __name__ == "__main__":
    main()
