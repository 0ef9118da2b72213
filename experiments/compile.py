"""Compiles a run's steps for TPUs that are not there, and says what they need:

  python -m experiments.compile NAME --topology v5p-64 [--field value ...]

  --topology v5p-64      64 chips of v5p (numbers are CHIPS; gcloud's v5p-128), or the slice's shape: v5p:4x4x4.
                         Chips: v4, v5e, v5p, v6e, 7x. A wrong one lists those that there are.
                         Mesh and sequences at a time are chosen for it (engram_jax/aot/slices.py), unless the overrides
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
import sys
from collections.abc import Sequence
from pathlib import Path

from engram_jax.aot.chips import Topology, topology
from engram_jax.aot.slices import laid_out
from engram_jax.commands.command_line import exit_status
from engram_jax.commands.run_options import parse
from engram_jax.config import RunConfig, replace, require
from engram_jax.sharding import MESH_AXES
from experiments.pods.compile_report import (
    FITS,
    MORE_PROGRAMS,
    PROGRAMS,
    TOO_LARGE,
    compile_report,
    ranking,
    suggest,
    write,
)
from experiments.runs.registry import RUNS, build


def main(arguments: Sequence[str]) -> int:
    """Does what the command line `arguments` say; returns the exit status. Errors are one line each."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nRuns: {', '.join(RUNS)}")
        return FITS
    if arguments[0] == "--matrix":
        from experiments.pods.compile_matrix import write_matrix

        return write_matrix(arguments[1:])
    name, *rest = arguments
    require(not name.startswith("-"), f"the run's name comes first: NAME {' '.join(arguments)}")
    options, overrides = _options(rest)
    require(options.topology is not None, "say for which chips: --topology v5p-64, for example.")
    where = topology(options.topology, options.slices)
    config = parse(
        _start(build(name), where, overrides), overrides, f"python -m experiments.compile {name}", __doc__ or ""
    ).config
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
