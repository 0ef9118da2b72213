"""Compiles a run's steps for TPUs that are not there, and says what they need:

  python -m experiments.compile NAME --topology v5p-64 [--field value ...]

  --topology v5p-64      64 chips of v5p (numbers are CHIPS; gcloud's v5p-128), or the slice's shape: v5p:4x4x4.
                         Chips: v4, v5e, v5p, v6e, 7x. A wrong one lists those that there are.
                         Mesh and sequences at a time are chosen for it (experiments/slices.py), unless the overrides
                         name an axis of the mesh or --train.grad_accum.
  --slices N             N such slices, joined by the slower network; the mesh's data axis counts over them first
  --programs train eval  which steps (default: these); decode: a token each for data.batch_size sequences of seq_len
  --quick                stop when memory is assigned, after a minute instead of ten (of a model of 27 B): without the
                         compiler's own cycles and the proof that every kernel fits the chip's VMEM
  --suggest              if it does not fit: compile the standard remedies, quickly, and rank what fits by its
                         estimated time
  --out DIR              where NAME-TOPOLOGY.json and .md go (default compile/)
  --keep_hlo             the programs' text beside them
  --matrix               the paper's models on the usual slices, into docs/pods.md; goes on where it was interrupted
  NAME --help            every field of the run that can be overridden

Needs libtpu (uv run --extra tpu), no TPU and no data. Ends with 0 if all fits, 3 if something does not, 2 after a
mistake in the arguments, 1 if the compiler gave up.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engram_jax.aot.chips import Topology, topology
from engram_jax.config import ConfigError, RunConfig, replace, require, to_dict
from engram_jax.sharding import MESH_AXES
from engram_jax.training.errors import FINISHED, RunError
from experiments.command_line import exit_status
from experiments.registry import RUNS, build
from experiments.run import parse
from experiments.slices import laid_out

FITS, TOO_LARGE = FINISHED, 3
PROGRAMS = ("train", "eval")
MORE_PROGRAMS = ("decode",)

Compile = Callable[..., dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Does what the command line `arguments` say; returns the exit status. Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nRuns: {', '.join(RUNS)}")
        return FITS
    if arguments[0] == "--matrix":
        from experiments.compile_matrix import write_matrix

        return write_matrix(arguments[1:])
    name, *rest = arguments
    require(not name.startswith("-"), f"the run's name comes first: NAME {' '.join(arguments)}")
    options, overrides = _options(rest)
    require(options.topology is not None, "say for which chips: --topology v5p-64, for example.")
    where = topology(options.topology, options.slices)
    config = parse(_start(build(name), where, overrides), overrides).config
    wrong = set(options.programs) - {*PROGRAMS, *MORE_PROGRAMS}
    known = ", ".join((*PROGRAMS, *MORE_PROGRAMS))
    require(not wrong, f"--programs {' '.join(sorted(wrong))} is none of {known}.")

    from engram_jax.aot.render import headline, page

    keep_hlo = options.out if options.keep_hlo else None
    report = compile_report(config, where, options.programs, keep_hlo, quick=options.quick)
    print(page(report), flush=True)
    print(f"\nWritten: {write(report, options.out)}")
    if not report["fits"] and options.suggest:
        ranked = suggest(config, where, options.programs)
        print(ranking(ranked))
        best = next((r for _, r in ranked if r and r["fits"]), None)
        if best:
            print(f"\nThe best of them: {headline(best)}\nWritten: {write(best, options.out / 'suggested')}")
    return FITS if report["fits"] else TOO_LARGE


def _start(run: RunConfig, where: Topology, overrides: Sequence[str]) -> RunConfig:
    """The run laid out for the chips; with its own mesh where the overrides name an axis, whose rest they then mean."""
    chosen = laid_out(run, where)
    if not any(word.startswith("--train.mesh_") for word in overrides):
        return chosen
    return replace(chosen, **{f"train__mesh_{axis}": getattr(run.train, f"mesh_{axis}") for axis in MESH_AXES})


def _options(rest: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the overrides of the run's fields that are left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--suggest", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("compile"))
    parser.add_argument("--keep_hlo", "--keep-hlo", action="store_true")
    return parser.parse_known_args(rest)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
