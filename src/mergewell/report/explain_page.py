"""The page of `mergewell explain`: one HTML file that holds everything and needs no script."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mergewell.explain.averaging import BatchNorm
from mergewell.explain.explanation import Explanation
from mergewell.report import explain_figures as figures
from mergewell.report import numbers
from mergewell.report.results import write_text

HERE = Path(__file__).parent


def write_explain_page(found: Explanation, path: Path) -> Path:
    """Write the page of an explanation, and return its path.

    Raises:
        OutputError: the folder cannot be written.
    """
    return write_text(path, render_explain_page(found))


def render_explain_page(found: Explanation) -> str:
    """Return the page as one HTML text."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = numbers.percent
    environment.filters["number"] = numbers.number
    environment.filters["fixed"] = numbers.fixed
    names = ("page.css", "explain.css")
    style = "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("explain.html.jinja").render(
        found=found,
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'",
        listed=numbers.listed,
        percent_range=numbers.percent_range,
        value_of=figures.value_of,
        way_name=figures.way_name,
        subjects=figures.SUBJECTS,
        **_drawn(found),
    )


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
