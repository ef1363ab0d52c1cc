"""The figures of accuracy and task vectors: each a pure function to one SVG, told also by a table.

What is drawn (`Series`) is plain data, so that figure and table cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree.ElementTree import Element

from mergewell.report import svg
from mergewell.report.numbers import fixed, percent, percent_range
from mergewell.report.results import MEAN, Matrix, Results

Kind = Literal["base", "merge", "best", "ensemble", "expert"]

COSINE_STEPS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
"""Where the cosine matrix changes shade: task vectors are mostly near orthogonal."""

SHORT = 15
"""Characters of a model's or task's name that fit a narrow page; a few more fit a wide one."""


@dataclass(frozen=True, slots=True)
class Series:
    """The accuracies of one model: by task, and their mean under the task "mean"."""

    name: str
    kind: Kind
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


def accuracy_series(results: Results, best: str | None) -> tuple[Series, ...]:
    """Return base, merges, ensemble and experts in drawing order; absent models are left out."""
    accuracy, intervals = results.accuracy, results.intervals
    rows: list[tuple[str, Kind, Mapping[str, float], Mapping[str, tuple[float, float]]]] = [
        ("base", "base", accuracy.base, intervals.base)
    ]
    for method, values in accuracy.merged.items():
        kind: Kind = "best" if method == best else "merge"
        rows.append((method, kind, values, intervals.merged.get(method, {})))
    rows.append(("ensemble", "ensemble", accuracy.ensemble, intervals.ensemble))
    rows.append(("experts", "expert", accuracy.expert, intervals.expert))
    return tuple(
        Series(name, kind, {**values, MEAN: math.fsum(values.values()) / len(values)}, spread)
        for name, kind, values, spread in rows
        if values
    )


def accuracy_bars(series: Sequence[Series], task: str, *, title: str) -> str:
    """Draw one task's accuracies as bars from 0 to 100 %, whiskers showing the intervals."""
    row = 26
    told = ", ".join(f"{one.name} {percent(one.values[task])}" for one in series)
    root = svg.figure("bars", f"Accuracy, {title}: {told}", row * len(series) + 4)
    plot = svg.add(root, "svg", {"class": "plot", "x": "28%", "width": "56%", "height": "100%"})
    for quarter in range(5):
        line = {"class": "grid", "x1": svg.share(quarter / 4), "x2": svg.share(quarter / 4)}
        svg.add(plot, "line", {**line, "y1": 0, "y2": row * len(series) + 4})
    for index, one in enumerate(series):
        value, top = one.values[task], index * row + 2
        spread = one.intervals.get(task)
        shown = f"{percent(value)} ({percent_range(*spread)})" if spread else percent(value)
        svg.label(root, one.name, y=top + 16, wide=SHORT + 3, narrow=SHORT)
        group = svg.add(plot, "g", {"class": "row"})
        svg.tip(group, f"{title}, {one.name}: {shown}")
        svg.add(group, "rect", {"class": "reach", "y": top, "width": "100%", "height": row})
        bar = {"class": f"bar {one.kind}", "y": top + 5, "width": svg.share(value), "rx": 1.5}
        svg.add(group, "rect", {**bar, "height": row - 10})
        if spread:
            _whisker(group, spread, top + row / 2)
        strong = " strong" if one.kind == "best" else ""
        svg.add(
            root,
            "text",
            {"class": f"value end{strong}", "x": "100%", "y": top + 16},
            percent(value),
        )
    return svg.written(root)


def cosine_matrix(names: Sequence[str], cosines: Matrix) -> str:
    """Draw the cosines between task vectors; every value stands in its cell."""
    row, head, count = 44, 24, len(names)
    pairs = ", ".join(
        f"{names[i]} and {names[j]} {_cosine(cosines[i][j])}"
        for i in range(count)
        for j in range(i + 1, count)
    )
    room = "" if count <= 5 else " many" if count <= 10 else " crowd"
    told = f"Cosines between task vectors: {pairs}"
    root = svg.figure(f"cosines{room}", told, head + row * count)
    plot = svg.add(root, "svg", {"class": "plot", "x": "32%", "width": "68%", "height": "100%"})
    for i, name in enumerate(names):
        svg.label(
            root, name, y=head + row * i + 27, wide=SHORT + 3, narrow=SHORT - 2, before=f"{i + 1} "
        )
        place = {"class": "tick middle", "x": svg.share((i + 0.5) / count), "y": 15}
        svg.add(plot, "text", place, str(i + 1))
        for j, other in enumerate(names):
            value = cosines[i][j]
            tone = "own" if i == j else cosine_tone(value)
            group = svg.add(plot, "g", {"class": "row"})
            svg.tip(group, f"{name} and {other}: cosine {_cosine(value)}")
            size = {"width": svg.share(1 / count), "height": row}
            place = {"x": svg.share(j / count), "y": head + row * i}
            svg.add(group, "rect", {"class": f"cell {tone}", **place, **size})
            middle = {"x": svg.share((j + 0.5) / count), "y": head + row * i + 27}
            svg.add(group, "text", {"class": f"inside middle on-{tone}", **middle}, _cosine(value))
    return svg.written(root)


def cosine_tone(value: float | None) -> str:
    """Return a cell's colour class: its sign, and how many of the COSINE_STEPS it passes."""
    if value is None:
        return "none"
    passed = sum(abs(value) >= step for step in COSINE_STEPS)
    return f"{'plus' if value >= 0 else 'minus'}-{passed}"


def _whisker(group: Element, spread: tuple[float, float], middle: float) -> None:
    low, high = (svg.share(end) for end in spread)
    line = {"class": "whisker", "y1": middle, "y2": middle}
    svg.add(group, "line", {**line, "x1": low, "x2": high})
    for end in (low, high):
        cap = {"class": "whisker", "x1": end, "x2": end, "y1": middle - 4, "y2": middle + 4}
        svg.add(group, "line", cap)


def _cosine(value: float | None) -> str:
    return "undefined" if value is None else fixed(value)
