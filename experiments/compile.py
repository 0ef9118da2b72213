"""Compiles a run's steps for a TPU slice and reports memory, time and network. No TPU is needed:

  python -m experiments.compile NAME --topology v5p-64 [--field value ...]

  --list                 print all runs, one line each
  --topology v5p-64      the slice: 64 chips of v5p, or its shape v5p:4x4x4. Numbers count chips; gcloud calls this
                         slice v5p-128. The chips are v4, v5e, v5p, v6e, 7x. An unknown slice prints the valid ones.
  --slices N             N such slices, joined by the slower network; the mesh's data axis counts over them first
  --programs train eval  the steps to compile (default: train eval). decode: one token for each of data.batch_size
                         sequences of seq_len tokens
  --quick                stop when the compiler has assigned memory: one minute instead of ten for a model of 27 B. The
                         report then lacks the compiler's own cycles, and the proof that every kernel fits the VMEM
  --suggest              if the run does not fit: compile the standard remedies with --quick, and rank those that fit by
                         their estimated time
  --out DIR              the folder for NAME-TOPOLOGY.json and .md (default compile/)
  --keep_hlo             write the programs' text there too
  NAME --help            print every field of the run that can be changed
  --matrix               compile the paper's models for the usual slices, and write the table of docs/pods.md; resumes
                         where it was interrupted

Mesh axes and batch parts are chosen for the slice (engram_jax/aot/slices.py). A field --train.mesh_AXIS or
--train.grad_accum replaces this choice.

Needs the extra tpu (uv run --extra tpu, or once: uv sync --extra tpu), and no data. Exit status: 0 everything fits,
3 something does not fit, 2 a mistake in the arguments, 1 the compiler gave up.
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
from experiments.runs.registry import build, list_of_runs


def main(arguments: Sequence[str]) -> int:
    """Runs the command line `arguments`; returns the exit status. An error is one line."""
    return exit_status(lambda: run(list(arguments)))


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return FITS
    if arguments == ["--list"]:
        print(list_of_runs())
        return FITS
    if arguments[0] == "--matrix":
        from experiments.pods.compile_matrix import write_matrix

        return write_matrix(arguments[1:])
    name, *rest = arguments
    require(
        not name.startswith("-"),
        f"{name}: the run's name comes first. Write NAME {' '.join(arguments)}; --list prints the names.",
    )
    options, overrides = _options(rest)
    require(options.topology is not None, "--topology is missing. Give the TPU slice, for example --topology v5p-64.")
    where = topology(options.topology, options.slices)
    config = parse(
        _start(build(name), where, overrides), overrides, f"python -m experiments.compile {name}", __doc__ or ""
    ).config
    wrong = set(options.programs) - {*PROGRAMS, *MORE_PROGRAMS}
    known = ", ".join((*PROGRAMS, *MORE_PROGRAMS))
    require(not wrong, f"--programs {' '.join(sorted(wrong))} is unknown. The programs are {known}.")

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
            print(f"\nThe best remedy: {headline(best)}\nWritten: {write(best, options.out / 'suggested')}")
    return FITS if report["fits"] else TOO_LARGE


def _start(run: RunConfig, where: Topology, overrides: Sequence[str]) -> RunConfig:
    """The run laid out for the chips. If the overrides name a mesh axis, the other axes are the run's own."""
    chosen = laid_out(run, where)
    if not any(word.startswith("--train.mesh_") for word in overrides):
        return chosen
    return replace(chosen, **{f"train__mesh_{axis}": getattr(run.train, f"mesh_{axis}") for axis in MESH_AXES})


def _options(rest: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the other words: overrides of the run's fields."""
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
