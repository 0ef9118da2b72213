"""The report of `depth`: the verdict as values, its sentences, the tables, and the lines of results.jsonl.

Legend: S seeds, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_jax.analysis.logit_lens import DIRECTIONS
from engram_jax.evaluation.over_seeds import LEVEL, OverSeeds
from engram_jax.evaluation.statistics import Metric
from engram_jax.markdown import bullets, table
from experiments.studies.analyses.depth.measure import Likeness, Measured, nearest
from experiments.studies.analyses.raw_numbers import number
from experiments.studies.trained.pair import ENGRAM, MOE

COARSE = 0.25
"""Where soft alignment weighs a larger share of all layers than this, it cannot tell layers apart."""

# --- the verdict ---


@dataclass(frozen=True)
class Convergence:
    """How near each layer's prediction is to the final one, with memory minus without; below 0 is earlier."""

    direction: str
    by: OverSeeds
    """Nats, mean over the layers between the embedding and the last layer."""
    lower: tuple[int, ...]
    """Layers whose divergence is lower with memory, by more than the spread."""
    higher: tuple[int, ...]
    layers: int


@dataclass(frozen=True)
class Alignment:
    """Which of the baseline's layers the layers with memory are like, in layers."""

    shift: OverSeeds
    """How much further on than the control, the mean over layers."""
    ours: float
    """How much further on than the same layer, as the paper reads it: with memory, against the baseline."""
    control: float
    """The same of the baseline against its other seeds."""
    itself: float
    """The same of the model with memory against its other seeds."""
    layers: int
    nearest: int
    """Layers that soft alignment weighs."""
    same_cka: float
    """CKA of equal layers between seeds of the baseline."""
    other_cka: float
    """The same from the baseline to the model with memory."""

    @property
    def is_coarse(self) -> bool:
        return self.nearest > COARSE * self.layers


@dataclass(frozen=True)
class Verdict:
    convergence: tuple[Convergence, ...]
    alignment: Alignment | None
    """None with one seed: there is no other run of the baseline to compare with."""


def over(values: np.ndarray) -> OverSeeds:
    return OverSeeds(tuple(map(float, values)))


def sign(by: OverSeeds) -> int:
    """-1 or 1 where the difference is more than the spread over seeds, else 0."""
    return int(np.sign(by.mean)) if by.differs_from() else 0


def verdict(measured: Measured) -> Verdict:
    converged = []
    for direction in DIRECTIONS:
        by_SL = (measured.divergence(ENGRAM, direction) - measured.divergence(MOE, direction))[:, 1:-1]
        signs = [sign(over(by_S)) for by_S in by_SL.T]
        lower, higher = (tuple(layer for layer, s in enumerate(signs) if s == which) for which in (-1, 1))
        converged.append(Convergence(direction, over(by_SL.mean(1)), lower, higher, by_SL.shape[1]))
    return Verdict(tuple(converged), _alignment(measured) if len(measured.seeds) > 1 else None)


def _alignment(measured: Measured) -> Alignment:
    control_SL, ours_SL, itself_SL = (
        measured.alignment(*pair) for pair in ((MOE, MOE), (MOE, ENGRAM), (ENGRAM, ENGRAM))
    )
    own_L = np.arange(ours_SL.shape[1])
    same, other = (
        float(np.mean([np.diag(like.cka_AB).mean() for like in measured.between(*pair)]))
        for pair in ((MOE, MOE), (MOE, ENGRAM))
    )
    ours, control, itself = (float((x_SL - own_L).mean()) for x_SL in (ours_SL, control_SL, itself_SL))
    shift = over((ours_SL - control_SL).mean(1))
    return Alignment(shift, ours, control, itself, len(own_L), nearest(len(own_L)), same, other)


def sentences(found: Verdict) -> list[str]:
    """The verdict in words."""
    lines = []
    for one in found.convergence:
        heads = {-1: "converges earlier with memory", 1: "converges later with memory", 0: _nothing(one.by)}
        lower, higher = (", ".join(map(str, layers)) or "none" for layers in (one.lower, one.higher))
        lines.append(
            f"KL({one.direction}), mean over layers 0 to {one.layers - 1}: {heads[sign(one.by)]}. {ENGRAM} against "
            f"{MOE}: {listed(one.by, 'nats')}. Single layers, by more than the spread: lower in {lower}; higher in "
            f"{higher}."
        )
    if (aligned := found.alignment) is None:
        return [*lines, "Alignment: with one seed there is no other run of the baseline to compare with."]
    heads = {-1: "towards earlier layers", 1: "towards deeper layers", 0: _nothing(aligned.shift)}
    lines += [
        f"Alignment as the paper reads it, without a control: {ENGRAM}'s layers are like layers of the baseline "
        f"{aligned.ours:+.2f} further on, on average. But the baseline's own layers, trained from another seed, are at "
        f"{aligned.control:+.2f}, and {ENGRAM} against other seeds of itself at {aligned.itself:+.2f}. So much the "
        "index shows without a difference in memory.",
        f"Alignment beyond the control: {heads[sign(aligned.shift)]}. {listed(aligned.shift, 'layers')}.",
    ]
    if aligned.is_coarse:
        lines.append(
            f"With {aligned.layers} layers, of which the {aligned.nearest} nearest count, alignment is coarse: it "
            "hardly moves until one of the nearest layers gives way to another, and then it jumps. Equal values over "
            "seeds do not mean that it is precise."
        )
    lines.append(
        f"CKA of equal layers: {aligned.same_cka:.3f} between seeds of {MOE}, {aligned.other_cka:.3f} from {MOE} to "
        f"{ENGRAM}."
    )
    return lines


def _nothing(by: OverSeeds) -> str:
    return "no difference found beyond the spread over seeds" if len(by.values) > 1 else "one seed alone shows nothing"


def listed(by: OverSeeds, unit: str) -> str:
    """The mean with its unit, each seed's value, and the interval."""
    text = f"{by.mean:+.3f} {unit} (seed by seed {', '.join(f'{value:+.3f}' for value in by.values)}"
    if (found := by.interval()) is None:
        return f"{text}; one seed: its spread is unknown)"
    return f"{text}; {LEVEL} % interval {found[0]:+.3f} to {found[1]:+.3f})"


# --- the report ---


def report(measured: Measured) -> list[str]:
    """The lines of report.md."""
    metric = next(iter(measured.lenses.values()))[0][DIRECTIONS[0]][0]
    lines = ["## Verdict", "", *bullets(sentences(verdict(measured))), "", "## Logit lens", ""]
    lines += [
        f"Nats, mean over {metric.count:,} held-out tokens of {metric.clusters:,} documents and over the seeds. Layer "
        f"-1 is the embedding. Differences are taken seed by seed, each layer by itself, with {LEVEL} % intervals over "
        "seeds.",
    ]
    for direction in DIRECTIONS:
        moe_SL, engram_SL = (measured.divergence(point, direction) for point in (MOE, ENGRAM))
        lines += ["", f"KL({direction})", ""]
        body = [
            [str(la - 1), f"{moe_SL[:, la].mean():.3f}", f"{engram_SL[:, la].mean():.3f}", *_cells(over(by_S))]
            for la, by_S in enumerate((engram_SL - moe_SL).T[:-1])
        ]
        lines += table(["layer", MOE, ENGRAM, "difference", f"{LEVEL} % interval"], body)
    return [*lines, "", "## Soft alignment", "", *_alignments(measured)]


def _alignments(measured: Measured) -> list[str]:
    if len(measured.seeds) < 2:
        return ["With one seed there is no control: train two or more."]
    control_SL, ours_SL = (measured.alignment(MOE, point) for point in (MOE, ENGRAM))
    itself_SL = measured.alignment(ENGRAM, ENGRAM)
    same_SL = np.array(
        [x.alignment_B for x in measured.likenesses if x.rows != x.columns and x.rows_seed == x.columns_seed]
    )
    layers = control_SL.shape[1]
    lines = [
        "Which of the baseline's layers (from 0) each layer is like, by CKA at the last tokens of "
        f"{measured.names:,} names. The {nearest(layers)} nearest of {layers} layers count; pairs are of different "
        "seeds. Control: the baseline against its own other seeds. Last column: a twin against the baseline of its own "
        "seed, which began as the same model.",
        "",
    ]
    body = [
        [
            str(j),
            f"{control_SL[:, j].mean():.2f}",
            f"{ours_SL[:, j].mean():.2f}",
            *_cells(over(by_S)),
            f"{itself_SL[:, j].mean():.2f}",
            f"{same_SL[:, j].mean():.2f}",
        ]
        for j, by_S in enumerate((ours_SL - control_SL).T)
    ]
    header = ["layer", "control", ENGRAM, "shift beyond control", f"{LEVEL} % interval", f"{ENGRAM} in {ENGRAM}'s"]
    return lines + table([*header, f"{ENGRAM}, same seed"], body)


def _cells(by: OverSeeds) -> list[str]:
    """Mean and interval, for a table."""
    found = by.interval()
    return [f"{by.mean:+.3f}", "unknown" if found is None else f"{found[0]:+.3f} to {found[1]:+.3f}"]


def paper() -> dict[str, Any]:
    """Curves and heat maps read off the paper's figure 4."""
    return json.loads((Path(__file__).parents[2] / "paper" / "depth_paper.json").read_text())


# --- results.jsonl ---


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A row for every run, direction and layer; then one for every two runs."""
    for point, lenses in measured.lenses.items():
        for seed, lens in zip(measured.seeds, lenses, strict=True):
            for direction, metrics in lens.items():
                for layer, metric in enumerate(metrics, start=-1):
                    about = {"measure": "lens", "point": point, "seed": seed, "direction": direction, "layer": layer}
                    numbers = {"kl": metric.value, "stderr_documents": metric.stderr}
                    yield about | numbers | {"tokens": metric.count, "documents": metric.clusters}
    for x in measured.likenesses:
        about = {"measure": "cka", "rows": x.rows, "rows_seed": x.rows_seed}
        about |= {"columns": x.columns, "columns_seed": x.columns_seed, "names": measured.names}
        yield about | {"cka": x.cka_AB.tolist(), "k": nearest(len(x.cka_AB)), "alignment": x.alignment_B.tolist()}


def from_rows(lines: Sequence[Mapping[str, Any]]) -> Measured:
    """The numbers that `rows` wrote."""
    lenses: dict[str, dict[int, dict[str, list[Metric]]]] = {}
    for row in (row for row in lines if row["measure"] == "lens"):
        of_run = lenses.setdefault(row["point"], {}).setdefault(int(row["seed"]), {})
        metric = Metric(number(row["kl"]), row["stderr_documents"], row["tokens"], row["documents"])
        of_run.setdefault(row["direction"], []).append(metric)
    likenesses = [
        Likeness(row["rows"], row["rows_seed"], row["columns"], row["columns_seed"], np.array(row["cka"], float))
        for row in lines
        if row["measure"] == "cka"
    ]
    seeds = tuple(sorted(next(iter(lenses.values()))))
    names = next((row["names"] for row in lines if row["measure"] == "cka"), 0)
    by_point = {point: [of_runs[seed] for seed in seeds] for point, of_runs in lenses.items()}
    return Measured(seeds, by_point, tuple(likenesses), names)
