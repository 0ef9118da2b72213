"""What the study `depth` has measured, and what its report says about it.

Legend: S seeds, L layers; A layers of one model, B of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_jax.analysis.cka import soft_alignment
from engram_jax.analysis.logit_lens import DIRECTIONS
from engram_jax.evaluation.statistics import Metric
from experiments.studies.analyses.trained_runs import table
from experiments.studies.engine.fits import LEVEL, interval
from experiments.studies.trained.pair import ENGRAM, MOE

NEAREST = 5 / 30
"""Share of the layers that soft alignment weighs, as in the paper; two at least, or nothing would be soft."""
COARSE = 0.25
"""A larger share of all layers than this is too many to tell layers apart."""


@dataclass(frozen=True)
class Likeness:
    """Of two runs' states, layer by layer."""

    rows: str
    rows_seed: int
    columns: str
    columns_seed: int
    cka_AB: np.ndarray

    @property
    def alignment_B(self) -> np.ndarray:
        return soft_alignment(self.cka_AB, nearest(len(self.cka_AB)))


@dataclass(frozen=True)
class Measured:
    """All that the report is made of."""

    seeds: tuple[int, ...]
    lenses: dict[str, list[dict[str, list[Metric]]]]
    """By point, one for each seed."""
    likenesses: tuple[Likeness, ...]
    names: int

    def divergence(self, point: str, direction: str) -> np.ndarray:
        """[S, L], the embedding first."""
        return np.array([[metric.value for metric in lens[direction]] for lens in self.lenses[point]])

    def between(self, rows: str, columns: str) -> list[Likeness]:
        """Of runs of different seeds."""
        return [
            like
            for like in self.likenesses
            if (like.rows, like.columns) == (rows, columns) and like.rows_seed != like.columns_seed
        ]

    def alignment(self, rows: str, columns: str) -> np.ndarray:
        """[S, B]: of each run of `columns`, the mean over its references, the runs of `rows` with other seeds."""
        likenesses = self.between(rows, columns)
        return np.array(
            [np.mean([x.alignment_B for x in likenesses if x.columns_seed == seed], axis=0) for seed in self.seeds]
        )


def nearest(layers: int) -> int:
    return max(2, round(NEAREST * layers))


def rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """A line for every run, direction and layer; then one for every two runs."""
    for point, lenses in measured.lenses.items():
        for seed, lens in zip(measured.seeds, lenses, strict=True):
            for direction, metrics in lens.items():
                for layer, metric in enumerate(metrics, start=-1):
                    of = {"measure": "lens", "point": point, "seed": seed, "direction": direction, "layer": layer}
                    numbers = {"kl": metric.value, "stderr_documents": metric.stderr}
                    yield of | numbers | {"tokens": metric.count, "documents": metric.clusters}
    for x in measured.likenesses:
        of = {"measure": "cka", "rows": x.rows, "rows_seed": x.rows_seed}
        of |= {"columns": x.columns, "columns_seed": x.columns_seed, "names": measured.names}
        yield of | {"cka": x.cka_AB.tolist(), "k": nearest(len(x.cka_AB)), "alignment": x.alignment_B.tolist()}


def report(measured: Measured) -> list[str]:
    metric = next(iter(measured.lenses.values()))[0][DIRECTIONS[0]][0]
    lines = ["## Verdict", "", *(f"- {sentence}" for sentence in verdict(measured)), "", "## Logit lens", ""]
    lines += [
        f"Nats, mean over {metric.count:,} held-out tokens of {metric.clusters:,} documents and the seeds; layer -1 is "
        f"the embedding. Differences are taken seed by seed, {LEVEL} % intervals over seeds, each layer by itself.",
    ]
    for direction in DIRECTIONS:
        moe_SL, engram_SL = (measured.divergence(point, direction) for point in (MOE, ENGRAM))
        lines += ["", f"KL({direction})", ""]
        body = [
            [str(la - 1), f"{moe_SL[:, la].mean():.3f}", f"{engram_SL[:, la].mean():.3f}", *differs(by_S)]
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
        f"Which of the baseline's layers (from 0) each layer is like, from CKA over {measured.names:,} last tokens of "
        f"names; k = {nearest(layers)} of {layers} layers, pairs of different seeds. Control: the baseline against its "
        "own other seeds. The last column is a twin against the baseline of its own seed, which began as the same "
        "model.",
        "",
    ]
    body = [
        [
            str(j),
            f"{control_SL[:, j].mean():.2f}",
            f"{ours_SL[:, j].mean():.2f}",
            *differs(by_S),
            f"{itself_SL[:, j].mean():.2f}",
            f"{same_SL[:, j].mean():.2f}",
        ]
        for j, by_S in enumerate((ours_SL - control_SL).T)
    ]
    header = ["layer", "control", ENGRAM, "shift beyond control", f"{LEVEL} % interval", f"{ENGRAM} in {ENGRAM}'s"]
    return lines + table([*header, f"{ENGRAM}, same seed"], body)


def verdict(measured: Measured) -> list[str]:
    """What the numbers say, a sentence or two each."""
    sentences = []
    for direction in DIRECTIONS:
        by_SL = (measured.divergence(ENGRAM, direction) - measured.divergence(MOE, direction))[:, 1:-1]
        by_S = by_SL.mean(1)
        heads = {
            -1: "converges earlier with memory",
            1: "converges later with memory",
            0: "nothing found beyond the spread over seeds" if len(by_S) > 1 else "one seed alone shows nothing",
        }
        one_by_one = "; ".join(
            f"{word} in {', '.join(str(la) for la, by in enumerate(by_SL.T) if sign(by) == which) or 'none'}"
            for word, which in (("lower", -1), ("higher", 1))
        )
        sentences.append(
            f"KL({direction}), mean over layers 0 to {by_SL.shape[1] - 1}: {heads[sign(by_S)]}. "
            f"{ENGRAM} against {MOE}: {said(by_S, 'nats')}. Layers taken one by one, beyond the spread: {one_by_one}."
        )
    if len(measured.seeds) < 2:
        return [*sentences, "Alignment: with one seed there is no other run of the baseline to compare with."]
    control_SL, ours_SL, itself_SL = (
        measured.alignment(*pair) for pair in ((MOE, MOE), (MOE, ENGRAM), (ENGRAM, ENGRAM))
    )
    own_L, shift_S = np.arange(ours_SL.shape[1]), (ours_SL - control_SL).mean(1)
    control, ours, itself = (f"{(x_SL - own_L).mean():+.2f}" for x_SL in (control_SL, ours_SL, itself_SL))
    sentences.append(
        f"Alignment as the paper reads it, without a control: {ENGRAM}'s layers are like layers of the baseline "
        f"{ours} further on, on average. But the baseline's own layers, trained from another seed, are at "
        f"{control}, and {ENGRAM} against other seeds of itself at {itself}: so much the index shows without a "
        "difference in memory."
    )
    shifts = {-1: "towards earlier layers", 1: "towards deeper layers", 0: "nothing found beyond the spread over seeds"}
    sentences.append(f"Alignment beyond the control: {shifts[sign(shift_S)]}. {said(shift_S, 'layers')}.")
    layers = len(own_L)
    if nearest(layers) > COARSE * layers:
        sentences.append(
            f"With {layers} layers and the {nearest(layers)} nearest of them alignment is coarse: it hardly moves "
            "until one of the nearest layers gives way to another, and then jumps. Equal values over seeds are no "
            "precision."
        )
    same, other = (
        np.mean([np.diag(like.cka_AB).mean() for like in measured.between(*pair)])
        for pair in ((MOE, MOE), (MOE, ENGRAM))
    )
    sentences.append(f"CKA of equal layers: {same:.3f} between seeds of {MOE}, {other:.3f} from {MOE} to {ENGRAM}.")
    return sentences


def sign(by_S: np.ndarray) -> int:
    """-1 or 1 where the interval over seeds leaves out 0."""
    low, high = interval(by_S)
    return int(low > 0) - int(high < 0)


def said(by_S: np.ndarray, unit: str) -> str:
    listed = ", ".join(f"{by:+.3f}" for by in by_S)
    text = f"{by_S.mean():+.3f} {unit} (seed by seed {listed}"
    if len(by_S) < 2:
        return f"{text}; one seed: its spread is unknown)"
    low, high = interval(by_S)
    return f"{text}; {LEVEL} % interval {low:+.3f} to {high:+.3f})"


def differs(by_S: np.ndarray) -> list[str]:
    """Two cells of a table."""
    low, high = interval(by_S)
    return [f"{by_S.mean():+.3f}", f"{low:+.3f} to {high:+.3f}" if len(by_S) > 1 else "unknown"]
