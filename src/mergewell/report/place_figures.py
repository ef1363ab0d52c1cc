"""The small charts of a value by place: by block, by tensor, by pair.

Axes end with the data, and the figure's numbers say where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mergewell.report import svg
from mergewell.report.numbers import counted

POINTS = 64
"""Dots of a chart; of more places, neighbours are pooled to their mean."""

TEXT = 14
"""Pixels between an axis and the words under it."""


@dataclass(frozen=True, slots=True)
class Point:
    """Neighbouring places, `first` to `last`, with the mean of their values."""

    first: str
    last: str
    value: float


def pooled(values: Mapping[str, float], count: int = POINTS) -> tuple[Point, ...]:
    """Return the values as at most `count` points of nearly equal size, in order."""
    names = list(values)
    count = min(count, len(names))
    edges = [round(index * len(names) / count) for index in range(count + 1)] if count else []
    return tuple(
        Point(names[i], names[j - 1], math.fsum(values[name] for name in names[i:j]) / (j - i))
        for i, j in pairwise(edges)
    )


def place_chart(
    values: Mapping[str, float],
    *,
    title: str,
    along: bool,
    show: Callable[[float], str],
    mark: float | None = None,
) -> str:
    """Draw a value by place as dots, joined where the places follow one another.

    `show` writes a value; `mark` is a value that a dashed line shows where it is in reach.
    """
    points = pooled(values)
    low, high = min(p.value for p in points), max(p.value for p in points)
    height, top, left = 96, 8, 0.17
    span = high - low
    root = svg.figure(
        "places",
        f"{title}: {show(low)} to {show(high)} over {counted(len(values), 'place')}",
        height + top + TEXT + 8,
    )

    def y(value: float) -> float:
        return top + height * (1 - (value - low) / span) if span else top + height / 2

    def x(index: int) -> str:
        return svg.share(left + 0.01 + (0.98 - left) * (index + 0.5) / len(points))

    for value in dict.fromkeys((high, low)):
        line = {"class": "grid", "x1": svg.share(left), "x2": "100%"}
        svg.add(root, "line", {**line, "y1": y(value), "y2": y(value)})
        tick = {"class": "tick", "x": 0, "y": y(value) + 4}
        svg.add(root, "text", tick, show(value))
    if mark is not None and low < mark < high:
        line = {"class": "cutoff", "x1": svg.share(left), "x2": "100%"}
        svg.add(root, "line", {**line, "y1": y(mark), "y2": y(mark)})
    if along:
        for index, (one, other) in enumerate(pairwise(points)):
            ends = {"x1": x(index), "x2": x(index + 1), "y1": y(one.value), "y2": y(other.value)}
            svg.add(root, "line", {"class": "path", **ends})
    for index, point in enumerate(points):
        dot = {"class": "spot", "cx": x(index), "cy": y(point.value), "r": 3}
        held = svg.add(root, "circle", dot)
        svg.tip(held, f"{_span(point)}: {show(point.value)}")
    foot = top + height + TEXT + 4
    for room in ("wide", "narrow"):
        ends = _ends(points, 22 if room == "wide" else 16)
        first = {"class": f"tick {room}", "x": svg.share(left), "y": foot}
        svg.add(root, "text", first, ends[0])
        last = {"class": f"tick end {room}", "x": "100%", "y": foot}
        svg.add(root, "text", last, ends[1])
    return svg.written(root)


def _span(point: Point) -> str:
    return point.first if point.first == point.last else f"{point.first} to {point.last}"


def _ends(points: Sequence[Point], room: int) -> tuple[str, str]:
    return svg.short(points[0].first, room), svg.short(points[-1].last, room)
