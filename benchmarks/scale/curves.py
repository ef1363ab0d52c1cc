"""Curves with their intervals, in panels side by side: the figure of a small study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from mergewell.report.svg import add, written

COLOURS = ("#1f6feb", "#bf5700", "#2da44e", "#8250df")
PANEL, HEIGHT, LEFT, TOP, BOTTOM = 290, 300, 52, 34, 66
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 8: 2.306, 23: 2.069}
"""Student's t at 97.5 % by degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Panel:
    """Curves by name over the same places; y is a fraction, shown in %."""

    title: str
    below: str
    places: Sequence[float]
    names: Sequence[str]
    """What stands under the places."""

    curves: Mapping[str, Sequence[Mean]]


def mean_of(values: Sequence[float]) -> Mean:
    """Return a mean with its interval by Student's t over the values."""
    count = len(values)
    middle = math.fsum(values) / count
    if count == 1:
        return Mean(middle, math.nan, math.nan, 1)
    spread = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (count - 1) / count)
    reach = T975.get(count - 1, 1.96) * spread
    return Mean(middle, middle - reach, middle + reach, count)


def percents(mean: Mean) -> str:
    """Return a mean of fractions and its interval in %."""
    if math.isnan(mean.low):
        return f"{100 * mean.value:.1f}"
    return f"{100 * mean.value:.1f} ({100 * mean.low:.1f} to {100 * mean.high:.1f})"


def data_of(mean: Mean) -> dict[str, float | None]:
    """Return a mean as plain data."""
    ends = [None if math.isnan(end) else round(end, 4) for end in (mean.low, mean.high)]
    return {"mean": round(mean.value, 4), "low": ends[0], "high": ends[1]}


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write panels side by side; all have one scale from top to bottom."""
    every = [m for panel in panels for curve in panel.curves.values() for m in curve]
    ends = [e for m in every for e in (m.value, m.low, m.high) if not math.isnan(e)]
    low, high = math.floor(10 * max(min(ends), -0.5)) / 10, math.ceil(10 * min(max(ends), 1.5)) / 10
    width = LEFT + PANEL * len(panels)
    root = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {HEIGHT}",
            "width": str(width), "height": str(HEIGHT), "role": "img", "aria-label": title,
            "font-family": "sans-serif", "font-size": "11",
        },
    )  # fmt: skip
    add(root, "rect", {"width": width, "height": HEIGHT, "fill": "white"})

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    for step in range(round(10 * low), round(10 * high) + 1):
        line = {"x1": LEFT, "x2": width - 10, "y1": y(step / 10), "y2": y(step / 10)}
        add(root, "line", {**line, "stroke": "#ddd"})
        place = {"x": LEFT - 6, "y": y(step / 10) + 4, "text-anchor": "end", "fill": "#555"}
        add(root, "text", place, f"{10 * step} %")
    for number, panel in enumerate(panels):
        _panel(root, panel, LEFT + 18 + PANEL * number, PANEL - 46, y)
    path.write_text(written(root) + "\n", encoding="utf-8")


def _panel(root: Element, panel: Panel, left: float, room: float, y: object) -> None:
    assert callable(y)
    first, last = panel.places[0], panel.places[-1]

    def x(place: float) -> float:
        return left + room * (place - first) / (last - first)

    middle = {"x": left + room / 2, "text-anchor": "middle"}
    add(root, "text", {**middle, "y": 20, "font-weight": "bold"}, panel.title)
    add(root, "text", {**middle, "y": HEIGHT - BOTTOM + 30, "fill": "#555"}, panel.below)
    for place, name in zip(panel.places, panel.names, strict=True):
        under = {"x": x(place), "y": HEIGHT - BOTTOM + 15, "text-anchor": "middle", "fill": "#555"}
        add(root, "text", under, name)
    for index, (name, curve) in enumerate(panel.curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        shift = 3 * (index - (len(panel.curves) - 1) / 2)
        points = [(x(p) + shift, y(m.value)) for p, m in zip(panel.places, curve, strict=True)]
        told = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        add(root, "polyline", {"points": told, "fill": "none", "stroke": colour, "stroke-width": 2})
        for (at, height), mean in zip(points, curve, strict=True):
            add(root, "circle", {"cx": at, "cy": height, "r": 3, "fill": colour})
            if not math.isnan(mean.low):
                ends = {"x1": at, "x2": at, "y1": y(mean.low), "y2": y(mean.high)}
                add(root, "line", {**ends, "stroke": colour})
        columns = max(1, math.ceil(len(panel.curves) / 2))
        at = left + (index % columns) * room / columns
        row = HEIGHT - BOTTOM + 46 + 14 * (index // columns)
        add(root, "circle", {"cx": at, "cy": row - 4, "r": 4, "fill": colour})
        add(root, "text", {"x": at + 8, "y": row}, name)
