"""A run's steps compiled for chips that need not be there: the report, what would make it fit, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engram_jax.aot.chips import Topology
from engram_jax.config import ConfigError, RunConfig, to_dict
from engram_jax.errors import FINISHED, RunError

FITS, TOO_LARGE = FINISHED, 3
"""Exit statuses."""

PROGRAMS = ("train", "eval")
MORE_PROGRAMS = ("decode",)

Compile = Callable[..., dict[str, Any]]


def compile_report(
    config: RunConfig,
    where: Topology,
    programs: Sequence[str] = PROGRAMS,
    keep_hlo: Path | None = None,
    compile_programs: Compile | None = None,
    detail: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """All that is known of this run on these chips; `detail` and `quick` as compile_apart has them.

    Raises:
      ConfigError: the config does not fit the chips (batch, mesh, heads, experts, vocabulary); nothing was compiled.
      RunError: the compiler gave up.
    """
    from engram_jax.aot.child import compile_apart
    from engram_jax.aot.remedies import advice

    reports = (compile_programs or compile_apart)(config, where, programs, keep_hlo, detail, quick)
    fits = all(r["memory"]["fits"] and r.get("host", {"fits": True})["fits"] for r in reports.values())
    mesh = next((r["mesh"] for r in reports.values() if "mesh" in r), {})
    return {
        "name": config.name,
        "topology": {
            "name": where.name,
            "text": str(where),
            "libtpu": where.libtpu,
            "slices": where.slices,
            "chips": where.chips,
            "hosts": where.hosts,
        },
        "mesh": mesh,
        "versions": {package: _version(package) for package in ("jax", "libtpu")},
        "fits": fits,
        "programs": reports,
        "advice": [] if fits else advice(reports, config, where),
        "config": to_dict(config),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def suggest(
    config: RunConfig, where: Topology, programs: Sequence[str], compile_programs: Compile | None = None
) -> list[tuple[Any, dict[str, Any] | None]]:
    """The remedies with their reports (None: refused), those that fit first, the fastest first among them."""
    from engram_jax.aot.remedies import remedies

    tried = []
    candidates = remedies(config, where)
    for number, remedy in enumerate(candidates, 1):
        print(f"suggest {number}/{len(candidates)}: {remedy}", flush=True)
        try:
            report = compile_report(
                remedy.apply(config), where, programs, None, compile_programs, detail=False, quick=True
            )
            tried.append((remedy, report))
        except (ConfigError, RunError) as error:
            print(f"  refused: {error}", flush=True)
            tried.append((remedy, None))

    def rank(item: tuple[Any, dict[str, Any] | None]) -> tuple:
        report = item[1]
        if report is None:
            return (2, 0.0)
        return (0, step_seconds(report)) if report["fits"] else (1, float(needed(report)))

    return sorted(tried, key=rank)


def needed(report: dict[str, Any]) -> int:
    """Bytes of HBM of the program that needs most."""
    return max(r["memory"]["needed"] for r in report["programs"].values())


def step_seconds(report: dict[str, Any]) -> float:
    """The estimate by which steps are compared: one resource after the other."""
    first = next(iter(report["programs"].values()))
    return first["times"]["estimates"]["in turn"]["seconds"] if "times" in first else float("inf")


def ranking(ranked: list[tuple[Any, dict[str, Any] | None]]) -> str:
    from engram_jax.aot.render import size

    lines = ["", "Remedies, the best first (step: estimate, one resource after the other):"]
    for remedy, report in ranked:
        if report is None:
            verdict = "refused"
        else:
            fits = "fits" if report["fits"] else "too large"
            seconds = f", {step_seconds(report):.3g} s" if report["fits"] else ""
            verdict = f"{fits}, {size(needed(report))} a chip{seconds}"
        lines.append(f"  {verdict:44}{remedy}")
    if not any(report and report["fits"] for _, report in ranked):
        lines.append("None of them fits: take more chips, or lower data.seq_len.")
    return "\n".join(lines)


def write(report: dict[str, Any], folder: Path) -> Path:
    """The report as JSON and Markdown; returns the path without its ending."""
    from engram_jax.aot.render import markdown

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['name']}-{report['topology']['name']}"
    path.with_name(path.name + ".json").write_text(json.dumps(report, indent=1))
    path.with_name(path.name + ".md").write_text(markdown(report))
    return path
