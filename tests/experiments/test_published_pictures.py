"""The pictures of experiments/results, drawn from their raw numbers: nothing is cut off, small, or out of its frame."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from pictures import check_picture

import experiments
from experiments.studies import STUDIES
from experiments.studies.engine import picture

RESULTS = Path(experiments.__file__).parent / "results"
FILES = sorted(RESULTS.rglob("results.jsonl"))


def figures(file):
    """The figures of a results.jsonl; none where the pictures need the runs."""
    study, rows = STUDIES[file.parent.name], [json.loads(line) for line in file.read_text().splitlines()]
    if study.analysis is None:
        there = {row["point"] for row in rows}
        points = [point for point in study.at(study.scales["tiny"]()) if point.name in there]
        return [picture.figure(study, points, rows)]
    report, drawing = (import_module(f"{study.analysis.package}.{name}") for name in ("report", "picture"))
    if not hasattr(report, "from_rows"):
        return []
    measured = report.from_rows(rows)
    if study.name == "depth":
        return [
            getattr(drawing, name)(measured, report.paper())
            for name in ("lens_figure", "cka_figure", "alignment_figure")
        ]
    papers = [report.paper_retained()] if study.name == "knock_out" else []
    return [drawing.figure(measured, *papers)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.relative_to(RESULTS).as_posix())
def test_a_published_picture(file):
    assert len(figures(file)) == {"depth": 3, "gates": 0}.get(file.parent.name, 1)
    for figure in figures(file):
        check_picture(figure)
        for axes in figure.axes:
            low, high = sorted(axes.get_xlim())
            for line in axes.lines:
                x = [value for value in line.get_xdata() if line.get_transform() == axes.transData]
                assert all(low <= value <= high for value in x), f"{axes.get_title()}: {line} leaves the frame"
