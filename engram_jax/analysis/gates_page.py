"""An HTML page of gates over sentences, complete in one file: no script, no font, no network.

Every cell shows its number, so no reader depends on its colour. Rows and columns have headings for screen readers.

Legend: T tokens, M residual streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np

from engram_jax.analysis.gates import COLOR_MAP, readable

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem; color: #1a1a1a; background: #fff; }
figure { margin: 2rem 0; overflow-x: auto; }
figcaption { margin-bottom: .4rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .4rem; text-align: center; white-space: pre; }
thead th { font-family: ui-monospace, monospace; font-weight: 600; border-bottom: 1px solid #777; }
tbody th { text-align: right; font-weight: 400; position: sticky; left: 0; background: #fff; }
tr.first td, tr.first th { border-top: 3px solid #fff; }
tr.saved td, tr.saved th { border-top: 1px solid #777; }
""".strip()


@dataclass(frozen=True)
class Sentence:
    """A sentence and its gates."""

    caption: str
    tokens: Sequence[str]
    gates: Mapping[str, np.ndarray]
    """Gates by Engram layer: float [T, M] in 0..1."""
    saved_T: np.ndarray | None = None
    """Nats by which the memory lowers the loss of the next token, for each token."""


def page(title: str, introduction: Sequence[str], sentences: Sequence[Sentence]) -> str:
    """The page's HTML. `introduction`: its paragraphs."""
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>",
        f"<body><main><h1>{escape(title)}</h1>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in introduction),
        *map(_figure, sentences),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _figure(sentence: Sentence) -> str:
    heads = "".join(f'<th scope="col">{escape(readable(token))}</th>' for token in sentence.tokens)
    lines = [f'<tr><th scope="col">token</th>{heads}</tr>']
    body = []
    for layer, gate_TM in sentence.gates.items():
        for m, gate_T in enumerate(gate_TM.T):
            cells = "".join(_cell(float(gate)) for gate in gate_T)
            kind = ' class="first"' if m == 0 else ""
            body.append(f'<tr{kind}><th scope="row">layer {escape(layer)}, stream {m}</th>{cells}</tr>')
    if sentence.saved_T is not None:
        cells = "".join("<td></td>" if np.isnan(nats) else f"<td>{nats:+.1f}</td>" for nats in sentence.saved_T)
        body.append(f'<tr class="saved"><th scope="row">saves on the next token</th>{cells}</tr>')
    return (
        f"<figure><figcaption>{escape(sentence.caption)}</figcaption>\n<table><thead>{''.join(lines)}</thead>\n<tbody>"
        + "\n".join(body)
        + "</tbody></table></figure>"
    )


def _cell(gate: float) -> str:
    red, green, blue, _ = matplotlib.colormaps[COLOR_MAP](gate)
    ink = "#000" if contrast_with_black((red, green, blue)) > 4.58 else "#fff"
    background = "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
    return f'<td style="background:{background};color:{ink}">{gate:.2f}</td>'


def contrast_with_black(rgb: tuple[float, float, float]) -> float:
    """WCAG 2's contrast ratio with black, (L + 0.05) / 0.05. With white it is 21 over this; one is above 4.58."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
    return (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) / 0.05
