"""How often a run sees the same text, known as soon as the corpus is tokenised."""

from __future__ import annotations

from engram_jax.config import DataConfig
from engram_jax.data.mixture import Mixture, parse_mixture
from engram_jax.data.packing import WindowSource

WORTH_AS_MUCH = 4.0
"""Epochs up to which repeated text is worth about as much as new; the worth of more decays to nothing (Muennighoff et
al. 2023, arXiv 2305.16264)."""


def epochs(train: WindowSource, config: DataConfig, steps: int) -> dict[str, float]:
    """How often each source of `config.corpus` is seen in so many steps, by its name: 1.0 is every window once."""
    asked = steps * config.batch_size
    if not isinstance(train, Mixture):
        return {config.corpus: asked / len(train)}
    whole, names = sum(train.weights), [name for name, _ in parse_mixture(config.corpus)]
    parts = zip(names, train.sources, train.weights, strict=True)
    return {name: asked * weight / whole / len(source) for name, source, weight in parts}


def repeats_line(train: WindowSource, config: DataConfig, steps: int) -> str:
    """One line if any text is seen more than once: a warning if so often that it loses its worth. Empty otherwise."""
    seen = {name: times for name, times in epochs(train, config, steps).items() if times > 1}
    if not seen:
        return ""
    times = ", ".join(f"{name} {number:,.1f} times" for name, number in seen.items())
    asked = f"{steps * config.batch_size * config.seq_len:,} tokens are asked for"
    if max(seen.values()) <= WORTH_AS_MUCH:
        return f"Epochs: {asked}, so the run sees {times}."
    return (
        f"warning: {asked}, so the run sees {times}. Repeated text is worth about as much as new for "
        f"{WORTH_AS_MUCH:.0f} epochs, and more of it for less and less (Muennighoff et al. 2023, arXiv 2305.16264): "
        "point data.corpus at more text, or lower train.steps."
    )
