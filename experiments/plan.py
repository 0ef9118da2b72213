"""Plans matched runs for a budget of training FLOPs on a TPU slice: dense, MoE, and MoE with memory.

  python -m experiments.plan --budget 2e20 --topology v5p:4x4x4

  --budget C        training FLOPs, from 1e14 to 1e23: C = 6 x active parameters x tokens, as the paper counts
  --topology NAME   the slice: v5p-64 (numbers count chips), or its shape v5p:4x4x4. An unknown slice
                    prints the valid ones
  --kinds moe ...   some of dense, moe, engram (default: all)
  --compile         ask the TPU compiler for memory and time, a minute or two for each kind. Needs the extra tpu:
                    uv run --extra tpu. Without --compile both are estimates from counts, and the plan says so
  --json            print the plan as JSON, with the settings of the runs
  --corpus PATH --tokenizer FILE --run_dir gs://BUCKET/FOLDER   written into the printed commands, which otherwise have
                    $CORPUS, $TOKENIZER and $RUNS in their place

  Ratios; the defaults are the paper's (experiments/runs/scaling.py, docs/scaling.md):
  --tokens_per_parameter 103   tokens / active parameters
  --sparsity 10                total / active parameters
  --rho 0.775                  the experts' share of the sparse parameters, for runs with memory

The runs need no declaration: experiments.run, experiments.compile and python -m tpu understand names like engram_2e20.
Exit status: 0 everything fits or is close, 3 a run is too large, 2 a mistake in the arguments, 1 the compiler gave up.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from engram_jax.aot.chips import Topology, topology
from engram_jax.aot.slices import laid_out
from engram_jax.commands.command_line import exit_status, field_paths, parsed
from engram_jax.config import RunConfig, require, to_dict
from engram_jax.counts import parameters, sparse_parameters
from experiments.pods.compile_report import FITS, TOO_LARGE, Compile, compile_report, needed
from experiments.pods.estimates import SHORTEST_STEP, Needs, needs
from experiments.pods.launch import commands
from experiments.runs import scaling


@dataclasses.dataclass(frozen=True)
class Options:
    budget: float = 0.0
    topology: str = ""
    kinds: tuple[str, ...] = scaling.KINDS
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    corpus: str = ""
    tokenizer: str = ""
    run_dir: str = ""
    tokens_per_parameter: float = scaling.PAPER.tokens_per_parameter
    sparsity: float = scaling.PAPER.sparsity
    rho: float = scaling.PAPER.rho

    @property
    def ratios(self) -> scaling.Ratios:
        return scaling.Ratios(self.tokens_per_parameter, self.sparsity, self.rho)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that is laid out for the slice, and its needs there."""

    run: RunConfig
    needs: Needs
    report: dict[str, Any] | None = None
    """The compiler's report (experiments/compile.py); None without --compile."""


def main(arguments: Sequence[str], compile_programs: Compile | None = None) -> int:
    """Runs the command line `arguments`; returns the exit status. An error is one line."""
    return exit_status(lambda: run(list(arguments), compile_programs))


def run(arguments: list[str], compile_programs: Compile | None = None) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return FITS
    options = parsed(Options, arguments, "python -m experiments.plan", field_paths, "; --help lists all options")
    require(
        options.budget > 0,
        f"--budget {options.budget:g} must be positive. Give the training FLOPs, for example --budget 2e20.",
    )
    require(bool(options.topology), "--topology is missing. Give the TPU slice, for example --topology v5p-64.")
    unknown = [kind for kind in options.kinds if kind not in scaling.KINDS]
    kinds = ", ".join(scaling.KINDS)
    require(bool(options.kinds), f"--kinds is empty. Give some of {kinds}.")
    require(not unknown, f"--kinds {' '.join(unknown)} is unknown. The kinds are {kinds}.")
    where = topology(options.topology)
    made = plan(options.budget, where, options.ratios)
    made = {kind: made[kind] for kind in scaling.KINDS if kind in options.kinds}
    if options.compile:
        for kind, planned in made.items():
            print(f"Compiling {planned.run.name} for {where}: a minute or two.", file=sys.stderr, flush=True)
            report = compile_report(
                planned.run, where, ("train",), compile_programs=compile_programs, detail=False, quick=True
            )
            made[kind] = dataclasses.replace(planned, report=report)
    text = {"corpus": options.corpus, "tokenizer": options.tokenizer, "run_dir": options.run_dir}
    if options.json:
        print(json.dumps(described(options.budget, where, options.ratios, made, text), indent=1))
    else:
        print(page(options.budget, where, options.ratios, made, text))
    return FITS if all(fits(planned) for planned in made.values()) else TOO_LARGE


def plan(budget: float, where: Topology, ratios: scaling.Ratios = scaling.PAPER) -> dict[str, Planned]:
    """The three runs of the budget on the slice, by kind.

    Raises:
      ConfigError: the budget lies outside of 1e14 to 1e23, or the slice has more devices than a step has sequences.
    """
    runs = scaling.triple(budget, ratios, where.devices)
    placed = {kind: laid_out(run, where) for kind, run in runs.items()}
    return {kind: Planned(run, needs(run, where)) for kind, run in placed.items()}


def fits(planned: Planned) -> bool:
    """False if the compiler, or without it the estimate, finds the run too large."""
    return planned.report["fits"] if planned.report else planned.needs.verdict != "too large"


def facts(planned: Planned) -> dict[str, Any]:
    """The numbers of a planned run, under the names of the config and of counts.py."""
    run, model, needs = planned.run, planned.run.model, planned.needs
    counts, (sparse, rho) = parameters(model), sparse_parameters(model)
    tokens = run.data.batch_size * run.data.seq_len * run.train.steps
    mesh = {axis: getattr(run.train, f"mesh_{axis}") for axis in ("fsdp", "expert")}
    known = {
        "num_hidden_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "n_routed_experts": model.moe.n_routed_experts,
        "moe_intermediate_size": model.moe.moe_intermediate_size if model.moe.enabled else 0,
        "intermediate_size": model.intermediate_size,
        "memory": counts.memory,
        "active": counts.active,
        "total": counts.total,
        "total_without_vocabulary": scaling.non_vocabulary(counts),
        "sparsity": scaling.non_vocabulary(counts) / counts.active,
        "rho": rho if sparse else None,
        "tokens": tokens,
        "steps": run.train.steps,
        "batch_size": run.data.batch_size,
        "seq_len": run.data.seq_len,
        "learning_rate": run.optimizer.learning_rate,
        "table_learning_rate": run.optimizer.learning_rate * run.optimizer.table_lr_multiplier,
        "warmup_steps": run.optimizer.warmup_steps,
        "six_n_d": 6 * counts.active * tokens,
        "flops": needs.flops,
        "mesh": mesh,
        "grad_accum": run.train.grad_accum,
        "estimate": {
            "memory": needs.memory,
            "needed": needs.needed,
            "available": needs.available,
            "verdict": needs.verdict,
            "assumed_mfu": needs.mfu,
            "step_seconds": needs.seconds,
            "chip_hours": needs.chip_hours,
            "chip_hours_at_peak": needs.chip_hours_at_peak,
        },
    }
    if planned.report:
        report = planned.report
        times = report["programs"]["train"].get("times", {}).get("estimates", {})
        known["compiled"] = {"fits": report["fits"], "needed": needed(report), "times": times}
    return known


def described(
    budget: float, where: Topology, ratios: scaling.Ratios, made: Mapping[str, Planned], text: Mapping[str, str]
) -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "budget": budget,
        "ratios": dataclasses.asdict(ratios),
        "topology": {"name": where.name, "text": str(where), "chips": where.chips, "hosts": where.hosts},
        "runs": {
            kind: {
                "name": planned.run.name,
                **facts(planned),
                "commands": commands(planned.run, where, **text),
                "config": to_dict(planned.run),
            }
            for kind, planned in made.items()
        },
    }


def page(
    budget: float, where: Topology, ratios: scaling.Ratios, made: Mapping[str, Planned], text: Mapping[str, str]
) -> str:
    """The plan for a terminal."""
    columns = {planned.run.name: column(facts(planned)) for planned in made.values()}
    names = list(columns)
    rows = [["", *names]] + [[row, *(columns[name][row] for name in names)] for row in columns[names[0]]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
    lines = [f"{budget:g} training FLOPs = 6 x active parameters x tokens, on {where}", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    one = next(iter(made.values()))
    lines += [
        "",
        f"Ratios: {ratios.tokens_per_parameter:g} tokens per active parameter; {ratios.sparsity:g} parameters per "
        f"active parameter; experts are {ratios.rho:.1%} of the sparse parameters. Rules, sources: docs/scaling.md.",
        "FLOPs: the budget, and in addition logits and attention's scores (counts.py).",
        "Nothing was measured. Memory: weights, optimizer state, tables and gradients are counted; activations, logits "
        f"and gathered weights are estimated. Time assumes {one.needs.mfu:.0%} of the peak ({where.chip.name}), and at "
        f'least {1000 * SHORTEST_STEP:g} ms a step. No run can be faster than "at the peak".',
    ]
    if not one.report:
        lines.append("--compile asks the TPU compiler; this takes a minute or two for each run.")
    for planned in made.values():
        lines += ["", f"# {planned.run.name}", *commands(planned.run, where, **text)]
    return "\n".join(lines)


def column(known: Mapping[str, Any]) -> dict[str, str]:
    """A run's facts as text, by the name of the row."""
    estimate, experts = known["estimate"], known["n_routed_experts"]
    rows = {
        "blocks x width": f"{known['num_hidden_layers']} x {known['hidden_size']}",
        "feed-forward": f"{experts} experts of {known['moe_intermediate_size']}"
        if experts
        else f"dense, {known['intermediate_size']}",
        "active": short(known["active"]),
        "total, no vocabulary": f"{short(known['total_without_vocabulary'])} ({known['sparsity']:.2f} x)",
        "memory (in total)": f"{short(known['memory'])} (rho {known['rho']:.1%})" if known["memory"] else "-",
        "tokens": short(known["tokens"]),
        "steps": f"{known['steps']:,} of {known['batch_size']} x {known['seq_len']}",
        "learning rate": f"{known['learning_rate']:g}"
        + (f", tables {known['table_learning_rate']:g}" if known["memory"] else ""),
        "FLOPs": f"{known['flops']:.3g}",
        "mesh, parts": ", ".join(f"{axis} {size}" for axis, size in known["mesh"].items() if size > 1)
        + f", {known['grad_accum']}",
        "memory of a chip": f"{estimate['needed'] / 1e9:.3g} of {estimate['available'] / 1e9:.3g} GB: "
        f"{estimate['verdict']}",
        "step, estimated": f"{estimate['step_seconds']:.3g} s",
        "chip-hours": f"{short(estimate['chip_hours'])} ({short(estimate['chip_hours_at_peak'])} at the peak)",
    }
    if compiled := known.get("compiled"):
        verdict = "fits" if compiled["fits"] else "too large"
        rows["memory, compiled"] = f"{compiled['needed'] / 1e9:.3g} GB: {verdict}"
        times = [compiled["times"][name] for name in ("overlapped", "in turn") if name in compiled["times"]]
        rows["step, compiled"] = " to ".join(f"{time['seconds']:.3g}" for time in times) + " s"
        rows["chip-hours, compiled"] = " to ".join(short(time["chip_hours"]) for time in times)
    return rows


def short(number: float) -> str:
    """5.69 B, 12,300, 0.5."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
