"""The table of docs/pods.md: the training step of the paper's models, compiled for the usual slices.

  python -m experiments.compile --matrix                     compile the missing cells, then write the table
  python -m experiments.compile --matrix engram_27b v5p-64   compile only cells of these models and slices
  python -m experiments.compile --matrix --table             write the table from the finished cells

A cell takes a minute or two (7x: several), because no code is generated. Each cell is a JSON file in
`experiments/results/matrix/`. Its name has a hash of the settings. So an interrupted matrix resumes, and a changed run
is compiled again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_jax.aot.chips import Topology, topology
from engram_jax.aot.slices import laid_out
from engram_jax.config import ConfigError, RunConfig, require
from engram_jax.errors import RunError
from experiments.pods.compile_report import Compile, compile_report
from experiments.runs.fingerprint import fingerprint
from experiments.runs.registry import build

MODELS = ("dense_4b", "moe_27b", "engram_27b", "engram_40b")
SLICES = ("v5e-256", "v5p-64", "v5p-128", "v6e-256", "7x-64")
CELLS = Path(__file__).parents[1] / "results" / "matrix"
PAGE = Path(__file__).parents[2] / "docs" / "pods.md"
BEGIN, END = "<!-- matrix: python -m experiments.compile --matrix -->", "<!-- end of matrix -->"


def write_matrix(arguments: Sequence[str], compile_programs: Compile | None = None) -> int:
    """Compiles the missing cells and writes the table. Returns 0, or 1 if a cell could not be compiled."""
    wanted = [word for word in arguments if not word.startswith("-")]
    unknown = set(wanted) - {*MODELS, *SLICES}
    require(
        not unknown,
        f"--matrix {' '.join(sorted(unknown))} is unknown. The models are {', '.join(MODELS)}; the slices are "
        f"{', '.join(SLICES)}.",
    )
    others = {word for word in arguments if word.startswith("-")} - {"--table"}
    require(
        not others,
        f"--matrix {' '.join(sorted(others))} is unknown. Give names of models and slices, or --table.",
    )
    cells = [(model, where) for where in SLICES for model in MODELS]
    failed = 0
    for number, (model, name) in enumerate(cells, 1):
        if "--table" in arguments or (wanted and not _is_wanted(model, name, wanted)):
            continue
        where = topology(name)
        config = laid_out(build(model), where)
        file = cell_file(config, where)
        if file.exists():
            continue
        print(f"matrix {number}/{len(cells)}: {model} on {name} ...", flush=True)
        start = time.perf_counter()
        try:
            report = compile_report(config, where, ["train"], None, compile_programs, quick=True)
        except (ConfigError, RunError) as error:
            print(f"  {error}", flush=True)
            failed = 1
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1))
        print(f"  {time.perf_counter() - start:.0f} s, {'fits' if report['fits'] else 'does not fit'}", flush=True)
        write_table(cells)
    write_table(cells)
    return failed


def _is_wanted(model: str, where: str, wanted: Sequence[str]) -> bool:
    models, slices = [w for w in wanted if w in MODELS], [w for w in wanted if w in SLICES]
    return (not models or model in models) and (not slices or where in slices)


def cell_file(config: RunConfig, where: Topology) -> Path:
    """The JSON file of a cell."""
    return CELLS / f"{config.name}-{where.name}-{fingerprint(config, where.name)}.json"


def write_table(cells: Sequence[tuple[str, str]]) -> None:
    from engram_jax.aot.render import table

    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows(cells))}\n\n{END}{after}")


def rows(cells: Sequence[tuple[str, str]]) -> list[list[str]]:
    head = ["slice", "model", "mesh", "parts", "HBM a chip", "", "sent a step", "FLOPs", "step, s", "MFU", "chip-hours"]
    body = []
    for model, name in cells:
        where = topology(name)
        file = cell_file(laid_out(build(model), where), where)
        body.append(
            [name, model, *(_cell(json.loads(file.read_text())) if file.exists() else ["not compiled", *[""] * 8])]
        )
    return [head, *body]


def _cell(report: dict[str, Any]) -> list[str]:
    from engram_jax.aot.render import size

    train = report["programs"]["train"]
    mesh = " ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1)
    memory, parts = train["memory"], str(report["config"]["train"]["grad_accum"])
    verdict = "fits" if report["fits"] else "too large"
    needed = [f"{size(memory['needed'])} of {size(memory['available'])}", verdict]
    if "times" not in train:
        return [mesh, parts, *needed, "", "", "", "", ""]
    low, high = (train["times"]["estimates"][name] for name in ("overlapped", "in turn"))
    sent = sum(c["sent"] + c["sent_between_slices"] for c in train["collectives"])
    return [
        mesh,
        parts,
        *needed,
        size(sent),
        f"{train['flops']['compiled'] / train['flops']['model']:.2f} x",
        f"{low['seconds']:.3g} to {high['seconds']:.3g}",
        f"{high['mfu']:.0%} to {low['mfu']:.0%}",
        f"{low['chip_hours']:,.0f} to {high['chip_hours']:,.0f}",
    ]
