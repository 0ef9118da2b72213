"""The commands that train a planned run: the run's name, and what differs from the run of that name as overrides."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from engram_jax.aot.chips import Topology
from engram_jax.aot.slices import laid_out
from engram_jax.config import ConfigError, RunConfig
from experiments.runs.registry import build


def commands(run: RunConfig, where: Topology, corpus: str = "", tokenizer: str = "", run_dir: str = "") -> list[str]:
    """Shell lines: for a slice of one's own first, then for one that python -m tpu makes.

    Args:
      run: laid out for the slice; its name is registered or that of a budget (experiments/runs/ladder.py).
      corpus, tokenizer, run_dir: for the commands; empty: $CORPUS, $TOKENIZER, $RUNS, which the reader sets.
    """
    words = [*_layout(run, where), "--data.corpus", _or(corpus, "$CORPUS"), "--data.tokenizer"]
    options = " ".join([*words, _or(tokenizer, "$TOKENIZER")])
    lines = [f"python -m experiments.run {run.name} {options}"]
    wanted = gcloud_type(where)
    if not wanted:
        return [*lines, "# python -m tpu makes no such slice: through GKE, see tpu/README.md"]
    name, folder = run.name.replace("_", "-").replace(".", "-"), _or(run_dir, "$RUNS").rstrip("/") + f"/{run.name}"
    return [
        *lines,
        f"python -m tpu create {name} --type {wanted} --queued --run-dir {folder}",
        f"python -m tpu wait {name}",
        f"python -m tpu watch {name} {run.name} --run-dir {folder} --install-gcsfuse -- {options}",
    ]


def gcloud_type(where: Topology) -> str:
    """What `python -m tpu create --type` calls the slice; empty if it knows none."""
    from tpu.accelerators import GENERATIONS, parse_type
    from tpu.errors import TpuError

    if where.chip.name not in GENERATIONS:
        return ""
    try:
        return parse_type(f"{where.chip.name}-{where.chips * GENERATIONS[where.chip.name].per_chip}").name
    except TpuError:
        return ""


def overrides(run: RunConfig, base: RunConfig) -> list[str]:
    """`--train.steps 50`, for every field in which the run differs from the base, quoted for a shell.

    Raises:
      ConfigError: a field differs that a command line cannot hold.
    """
    words = []
    for path, value, other in _leaves(run, base):
        if value != other and path != "name":
            words += [f"--{path}", *map(shlex.quote, map(str, value if isinstance(value, tuple) else (value,)))]
    return words


def _layout(run: RunConfig, where: Topology) -> list[str]:
    """Words that lay the named run out as `run` is."""
    named = build(run.name)
    try:
        base = laid_out(named, where)
    except ConfigError:  # the named run's own batch cannot be laid out there, only this one's
        return overrides(run, named)
    shape = f"{where.chip.name}:{'x'.join(map(str, where.dims))}"
    return ["--slice", shape, *overrides(run, base)]


def _leaves(run: Any, base: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(run):
        value, other = getattr(run, field.name), getattr(base, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, other, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, other


def _or(given: str, variable: str) -> str:
    return shlex.quote(given) if given else f'"{variable}"'
