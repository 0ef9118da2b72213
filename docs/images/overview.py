"""The README's picture: where the memory sits beside the experts, and what it was worth in the README's two runs.

python docs/images/overview.py RUNS_DIR      (a folder with the runs moe_tiny and engram_tiny)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MEMORY, EXPERTS, PLAIN = "#24292f", "#0f766e", "#b45309", "#e5e7eb"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = PLAIN) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    white = color in (MEMORY, EXPERTS)
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=color, ec="none")
    )
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", color="white" if white else INK, fontsize=9
    )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, lw=1.4, color=color))


def diagram(axes: Axes) -> None:
    """Tokens go two ways: through the blocks, and through a hash to rows of a table."""
    axes.set(xlim=(0, 10), ylim=(0, 7.6))
    axes.axis("off")
    box(axes, 0.3, 0.2, 9.4, 0.8, "tokens     … only  Alexander  the  Great  could")
    box(axes, 0.3, 1.7, 3.6, 0.8, "embedding")
    box(axes, 0.3, 3.3, 3.6, 0.8, "block: attention")
    box(axes, 0.3, 4.3, 3.6, 0.8, "block: experts", EXPERTS)
    box(axes, 0.3, 6.4, 3.6, 0.8, "next token")
    box(axes, 6.1, 1.7, 3.6, 0.8, "hash of the last 2, 3 tokens")
    box(axes, 6.1, 3.3, 3.6, 1.8, "memory\na table of millions of rows;\na token reads 16 of them", MEMORY)
    arrow(axes, (2.1, 1.0), (2.1, 1.7))
    arrow(axes, (2.1, 2.5), (2.1, 3.3))
    arrow(axes, (2.1, 5.1), (2.1, 6.4))
    arrow(axes, (7.9, 1.0), (7.9, 1.7), MEMORY)
    arrow(axes, (7.9, 2.5), (7.9, 3.3), MEMORY)
    arrow(axes, (6.1, 3.7), (2.25, 2.85), MEMORY)
    axes.text(4.9, 2.78, "gate", color=MEMORY, fontsize=9, ha="center")
    axes.text(2.35, 5.6, "for each layer", color=INK, fontsize=8, ha="left")
    axes.set_title("Experts compute, the memory is looked up", fontsize=10, fontweight="bold", loc="left")


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, validation loss) as metrics.jsonl has them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line and line["step"]]


def curves(axes: Axes, runs: Path) -> None:
    for name, label, color in (
        ("moe_tiny", "experts only", EXPERTS),
        ("engram_tiny", "a quarter of the idle experts\nreplaced by memory", MEMORY),
    ):
        points = losses(runs / name)
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=f"{label}: {points[-1][1]:.3f}")
    axes.set(xlabel="training step", ylabel="validation loss, nats per token")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_title("Equal FLOPs, equal parameters", fontsize=10, fontweight="bold", loc="left")


def draw(runs: Path, path: Path) -> None:
    figure = Figure(figsize=(10, 3.7), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    diagram(left)
    curves(right, runs)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).with_suffix(".png"))
