"""The pictures of `gates`: a page with every gate, and heat maps of a few sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from engram_jax.analysis.gates import draw_gates
from engram_jax.analysis.gates_page import Sentence, page
from engram_jax.files import write_text
from engram_jax.pictures import SMALL, TEXT, save
from experiments.studies.analyses.gates.measure import SENTENCES, Measured

IN_PICTURE = 4
"""Sentences in gates.png: half of them from SENTENCES, half held-out lines."""


def draw(measured: Measured, folder: Path) -> None:
    """Writes gates.html and gates.png."""
    write_text(folder / "gates.html", html(measured))
    save(figure(measured.sentences), folder / "gates.png")


def html(measured: Measured) -> str:
    """The page with every sentence."""
    introduction = (
        f"Gates of {measured.run} (0: shut, 1: open) for each token as it is read, by Engram layer and residual "
        "stream. The last row: the nats by which the memory lowers the loss of the next token.",
        "The first sentences were chosen without looking at the model. The held-out lines after them were chosen: the "
        "memory saves most on these.",
    )
    return page("Where the memory's gates open", introduction, measured.sentences)


def figure(sentences: Sequence[Sentence]) -> Figure:
    """Heat maps of the first sentences and the first held-out lines, one below the other."""
    half = IN_PICTURE // 2
    shown = [*sentences[: len(SENTENCES)][:half], *sentences[len(SENTENCES) :][: IN_PICTURE - half]]
    streams = sum(gate_TM.shape[1] for gate_TM in shown[0].gates.values())
    longest = max(len(sentence.tokens) for sentence in shown)
    size = (3 + 0.42 * longest, len(shown) * (1.4 + 0.3 * streams))
    made = Figure(figsize=size, dpi=150, layout="constrained")
    panels = made.subplots(len(shown), 1, squeeze=False)[:, 0]
    images = [draw_gates(axes, one.tokens, one.gates) for axes, one in zip(panels, shown, strict=True)]
    for axes, sentence in zip(panels, shown, strict=True):
        axes.set_title(sentence.caption.split("\n")[0], fontsize=TEXT, loc="left", parse_math=False)
        axes.tick_params(labelsize=SMALL)
    made.colorbar(images[0], ax=panels.tolist(), label="gate", fraction=0.03, pad=0.01)
    return made
