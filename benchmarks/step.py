"""Whole training steps: tokens per second of several runs, timed in turn.

python -m benchmarks.step [NAME ...] [--repeats 5]
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import tyro

from benchmarks.common import header
from benchmarks.memory import rounds
from engram_jax.data.loader import load_data, train_batches
from engram_jax.runs.parts import assemble
from engram_jax.training.feed import Feed
from engram_jax.training.planner import Planner
from engram_jax.training.step import make_train_step
from experiments.runs.registry import build


@dataclass(frozen=True)
class Options:
    names: tyro.conf.Positional[tuple[str, ...]] = ("moe_tiny", "engram_tiny", "dense_tiny")
    repeats: int = 5


class Run:
    def __init__(self, name: str):
        config = build(name)
        text = load_data(config.data, config.model.vocab_size, log=lambda _: None)
        self.parts = assemble(config, text.tokenizer.backend)
        self.tokens = config.data.batch_size * config.data.seq_len
        with (
            jax.set_mesh(self.parts.mesh),
            train_batches(text.train, config.data.batch_size, config.data.seed) as batches,
        ):
            self.state = self.parts.init_state()
            self.batch = Feed(self.parts.mesh, config.data.batch_size).whole(next(batches))
            self.planner, self.step = Planner(self.parts.store), make_train_step(self.parts)

    def __call__(self) -> jax.Array:
        with jax.set_mesh(self.parts.mesh):
            self.state, metrics, _ = self.step(self.state, self.batch, self.planner(self.batch))
        return metrics["loss"]


def main(options: Options) -> None:
    header()
    runs = {name: Run(name) for name in options.names}
    times = rounds(dict(runs), options.repeats)
    first = times[options.names[0]]
    for name, seconds in times.items():
        print(
            f"  {name:14} {seconds * 1e3:9.1f} ms per step  {runs[name].tokens / seconds:9,.0f} tokens/s  "
            f"{seconds / first:.2f} x {options.names[0]}"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
