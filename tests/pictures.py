"""Checks of any picture: nothing is cut off, nothing is too small to read, no two titles overlap."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

SMALLEST = 7
"""Points."""


def texts(figure):
    """The visible texts that are drawn: titles, labels, ticks in view, legends, annotations."""
    FigureCanvasAgg(figure).draw()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not min(low, high) <= tick.get_loc() <= max(low, high) or not axes.axison:
                    hidden |= {tick.label1, tick.label2}
    return [text for text in found if text not in hidden]


def check_picture(figure):
    """Raises AssertionError for a text outside the canvas, a text below SMALLEST, or titles that overlap."""
    drawn = texts(figure)
    assert drawn
    renderer, canvas = figure.canvas.get_renderer(), figure.bbox
    for text in drawn:
        box = text.get_window_extent(renderer)
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.width + 1 and box.y1 <= canvas.height + 1
        assert inside, f"{text.get_text()!r} leaves the canvas: {box} of {canvas}"
        assert text.get_fontsize() >= SMALLEST, f"{text.get_text()!r} has {text.get_fontsize()} points"
    titles = [
        title
        for axes in figure.axes
        for title in (axes.title, axes._left_title, axes._right_title)
        if title.get_text().strip()
    ]
    for one, other in itertools.combinations(titles, 2):
        boxes = [title.get_window_extent(renderer) for title in (one, other)]
        assert not boxes[0].overlaps(boxes[1]), f"{one.get_text()!r} overlaps {other.get_text()!r}"
