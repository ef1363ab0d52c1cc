"""The page of `mergewell explain`: one HTML file that holds everything and needs no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from mergewell.explain.averaging import BatchNorm
from mergewell.explain.explanation import Explanation
from mergewell.report import explain_figures as figures
from mergewell.report.files import write_page_text
from mergewell.report.html import render


def write_explain_page(found: Explanation, path: Path) -> Path:
    """Write the page of an explanation, and return its path.

    Raises:
        OutputError: the folder cannot be written, or something else stands there.
    """
    return write_page_text(path, render_explain_page(found))


def render_explain_page(found: Explanation) -> str:
    """Return the page as one HTML text."""
    values = {
        "found": found,
        "value_of": figures.value_of,
        "way_name": figures.way_name,
        "subjects": figures.SUBJECTS,
        **_drawn(found),
    }
    return render("explain.html.jinja", values, sheets=("page.css", "explain.css"), scripts=())


def _drawn(found: Explanation) -> dict[str, Any]:
    """Return the figures; BatchNorms that were re-estimated have charts of their own."""
    title = "Accuracy" if found.labels == "given" else "Agreement with the ensemble"
    kinds: list[BatchNorm] = list(dict.fromkeys(p.batch_norm for p in found.stability.points))
    said: dict[BatchNorm, str] = {
        "none": "",
        "stored": ", BatchNorm as stored",
        "reestimated": ", re-estimated",
    }
    charts: list[tuple[str, Markup]] = []
    for curve, what in (("magnitude", "Every weight times"), ("noise", "Relative noise")):
        for kind in kinds:
            points = [
                point
                for point in found.stability.points
                if point.curve == curve and point.which == "all"
            ]
            lines = [line for line in figures.curves_of(points, kind) if line.points]
            if lines:
                name = f"{what}{said[kind]}"
                charts.append((name, Markup(figures.agreement_chart(lines, title=name))))
    return {
        "title": title,
        "way_bars": Markup(figures.way_bars(found.averaging.variants, title=title)),
        "part_bars": Markup(figures.part_bars(found.averaging.decompositions)),
        "template_map": Markup(figures.template_map(found.templates)),
        "charts": charts,
        "drawn_subjects": list(dict.fromkeys(point.subject for point in found.stability.points)),
        "repaired": "reestimated" in kinds,
    }
