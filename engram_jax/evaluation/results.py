"""The JSON file of an evaluation: the numbers, the run and settings that they belong to, and how to repeat them.

    {"format": 1, "created", "command", "seed", "shared": {...}, "versions": {...}, "commit", "device",
     "run": {"name", "step", "config", ...}, "memory_scale": {"1": 0.0, ...},
     "tasks": {TASK: {"options": {...}, "seconds", "metrics": {NAME: {"value", "stderr", "count", ...}}, "details"}}}

A number that could not be measured is null.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_jax import files
from engram_jax.config import ConfigError, require
from engram_jax.errors import RunError
from engram_jax.evaluation.statistics import Metric
from engram_jax.evaluation.tasks import Result, Shared
from engram_jax.version import __version__

if TYPE_CHECKING:
    from engram_jax.evaluation.evaluated_run import EvaluatedRun

FORMAT = 1
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "lm_eval")
FOLDER = "evaluations"


def record(
    model: EvaluatedRun, shared: Shared, tasks: Mapping[str, dict[str, Any]], command: list[str]
) -> dict[str, Any]:
    """The content of the file. `tasks` come from `entry`, by name."""
    device = model.parts.mesh.devices.flat[0]
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": shared.seed,
        "shared": asdict(shared),
        "versions": versions(),
        "commit": commit(),
        "device": f"{model.parts.mesh.size} x {device.device_kind} ({device.platform})",
        "run": {
            "name": model.name,
            "step": model.step,
            "tokenizer_sha256": model.tokenizer.sha256,
            "corpus_sha256": model.corpus_sha256,
            "config": json.loads((model.run_dir / "config.json").read_text()),  # as trained, not as evaluated
        },
        "memory_scale": {str(layer): scale for layer, scale in model.memory_scale.items()},
        "tasks": dict(tasks),
    }


def entry(options: Any, result: Result, seconds: float) -> dict[str, Any]:
    """One task's part of the file. `options` is the task, a dataclass of its options."""
    metrics = {name: asdict(metric) for name, metric in result.metrics.items()}
    return {
        "options": asdict(options),
        "seconds": round(seconds, 2),
        "metrics": metrics,
        "details": result.details,
    }


def check_writable(path: Path) -> None:
    """Makes the folder and tries whether `save` can write the file, before there is anything to lose.

    Raises:
      RunError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.check_writable(path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes the file atomically. NaN and infinities become null, paths become text.

    Raises:
      RunError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, plain(content))
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {error.strerror}. Give --output a folder that can be written.")


def load(path: Path) -> dict[str, Any]:
    """The content of a file that `save` wrote.

    Raises:
      ConfigError: the file cannot be read, holds something else, or has a later format.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as the results of an evaluation: {error}.") from error
    require(
        isinstance(content, dict) and {"format", "tasks", "run"} <= set(content),
        f"{path} is not a results file of an evaluation: format, tasks or run is missing.",
    )
    require(
        content["format"] <= FORMAT,
        f"{path} has format {content['format']}, and this version reads formats up to {FORMAT}: use a newer version.",
    )
    return content


def load_all(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder, oldest first."""
    return sorted((load(path) for path in sorted(folder.glob("*.json"))), key=lambda r: r["created"])


def metric_of(values: Mapping[str, Any]) -> Metric:
    """A metric as it was saved."""
    value = math.nan if values["value"] is None else values["value"]
    return Metric(**{**values, "value": value})


def versions() -> dict[str, str]:
    """Versions of the installed packages that affect the numbers, by name."""
    found = {"python": platform.python_version(), "engram_jax": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that holds this package, with `+changes` if files differ from it; None outside of one."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        output = subprocess.run(
            ["git", "-C", package, *arguments], capture_output=True, text=True, check=True, timeout=20
        )
        return output.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # fails for a package installed into another project's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(package)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def plain(value: Any) -> Any:
    """The value with JSON's types only: what `load` returns after `save`."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
