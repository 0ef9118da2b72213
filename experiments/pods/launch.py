"""The commands that train a planned run. Where it differs from the run of that name, they have overrides."""

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
    """Shell lines: the first for a slice that you have, the others for a slice that python -m tpu creates.

    Args:
      run: laid out for the slice; its name is registered, or is the name of a budget (experiments/runs/ladder.py).
      corpus, tokenizer, run_dir: written into the commands. Empty: $CORPUS, $TOKENIZER, $RUNS, which the user sets.
    """
    words = [*_layout(run, where), "--data.corpus", _or(corpus, "$CORPUS"), "--data.tokenizer"]
    options = " ".join([*words, _or(tokenizer, "$TOKENIZER")])
    lines = [f"python -m experiments.run {run.name} {options}"]
    wanted = gcloud_type(where)
    if not wanted:
        return [*lines, "# python -m tpu cannot create this slice. Use GKE: see tpu/README.md"]
    name, folder = run.name.replace("_", "-").replace(".", "-"), _or(run_dir, "$RUNS").rstrip("/") + f"/{run.name}"
    return [
        *lines,
        f"python -m tpu create {name} --type {wanted} --queued --run-dir {folder}",
        f"python -m tpu wait {name}",
        f"python -m tpu watch {name} {run.name} --run-dir {folder} --install-gcsfuse -- {options}",
    ]


def gcloud_type(where: Topology) -> str:
    """The slice's name for `python -m tpu create --type`; empty if there is no such type."""
    from tpu.accelerators import GENERATIONS, parse_type
    from tpu.errors import TpuError

    if where.chip.name not in GENERATIONS:
        return ""
    try:
        return parse_type(f"{where.chip.name}-{where.chips * GENERATIONS[where.chip.name].per_chip}").name
    except TpuError:
        return ""


def overrides(run: RunConfig, base: RunConfig) -> list[str]:
    """Overrides such as `--train.steps 50`, quoted for a shell: one for every field that differs from the base."""
    words = []
    for path, value, other in _leaves(run, base):
        if value != other and path != "name":
            words += [f"--{path}", *map(shlex.quote, map(str, value if isinstance(value, tuple) else (value,)))]
    return words


def _layout(run: RunConfig, where: Topology) -> list[str]:
    """Words that give the named run the layout of `run`."""
    named = build(run.name)
    try:
        base = laid_out(named, where)
    except ConfigError:  # the named run's own batch does not fit the slice; this run's batch does
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
