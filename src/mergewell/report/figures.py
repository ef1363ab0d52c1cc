"""The figures: each a pure function from data to one SVG, told also by a table in the page.

What is drawn (`Series`, `NodeGroup`) is plain data, so that figure and table cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree.ElementTree import Element

from mergewell.report import svg
from mergewell.report.numbers import counted, fixed, number, percent, percent_range
from mergewell.report.results import MEAN, Cutoffs, LayerMLoss, Level, Matrix, Results

Kind = Literal["base", "merge", "best", "ensemble", "expert"]

NODE_GROUPS = 32
"""Columns of the node map: the narrowest layer of the common networks has as many nodes."""

SHADES = 7
"""Steps of the node map's colour scale, beside the one for exactly zero."""

DECADES = 4
"""Orders of magnitude that the node map tells apart; what is smaller has the palest shade."""

COSINE_STEPS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
"""Where the cosine matrix changes shade: task vectors are mostly near orthogonal."""

WIDE, NARROW = 40, 19
"""Characters of a layer's name that fit a wide and a narrow page."""

SHORT = 15
"""Characters of a model's or task's name that fit a narrow page; a few more fit a wide one."""


@dataclass(frozen=True, slots=True)
class Series:
    """The accuracies of one model: by task, and their mean under the task "mean"."""

    name: str
    kind: Kind
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Neighbouring nodes of a layer, `first` to `last`, with the mean of their M-Loss."""

    first: int
    last: int
    value: float


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


def node_groups(layer: LayerMLoss, count: int = NODE_GROUPS) -> tuple[NodeGroup, ...]:
    """Return the layer's nodes as at most `count` groups of nearly equal size."""
    nodes = len(layer.node)
    count = min(count, nodes)
    edges = [round(index * nodes / count) for index in range(count + 1)] if count else []
    return tuple(
        NodeGroup(start, stop - 1, math.fsum(layer.node[start:stop]) / (stop - start))
        for start, stop in pairwise(edges)
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


def layer_bars(layers: Sequence[LayerMLoss], cutoffs: Cutoffs) -> str:
    """Draw relative M-Loss by layer, in the network's order; shape and colour tell the level."""
    row, foot = 21, 22
    longest = _scale_end(max(layer.relative for layer in layers), cutoffs)
    worst = max(layers, key=lambda layer: layer.relative)
    root = svg.figure(
        "layers",
        f"Relative M-Loss of {counted(len(layers), 'layer')}; "
        f"highest {percent(worst.relative)} in {worst.layer}",
        row * len(layers) + foot,
    )
    plot = svg.add(root, "svg", {"class": "plot", "x": "34%", "width": "47%", "height": "100%"})
    for level, at in (("fair", cutoffs.fair), ("poor", cutoffs.poor)):
        if at < longest:
            x = svg.share(at / longest)
            line = {"class": f"cutoff {level}", "x1": x, "x2": x, "y1": 0, "y2": row * len(layers)}
            svg.add(plot, "line", line)
            place = {"class": "tick middle", "x": x, "y": row * len(layers) + 15}
            svg.add(plot, "text", place, percent(at, 0))
    for index, layer in enumerate(layers):
        level, top = cutoffs.level(layer.relative), index * row
        svg.label(root, layer.layer, y=top + 15, wide=WIDE, narrow=NARROW)
        group = svg.add(plot, "g", {"class": "row"})
        svg.tip(
            group,
            f"{layer.layer} ({layer.activation}, {counted(layer.nodes, 'node')}): "
            f"M-Loss {percent(layer.relative, 2)} relative, {number(layer.absolute)} absolute, "
            f"{level}",
        )
        svg.add(group, "rect", {"class": "reach", "y": top, "width": "100%", "height": row})
        bar = {"class": f"bar {level}", "y": top + 5, "height": row - 10, "rx": 1.5}
        svg.add(group, "rect", {**bar, "width": svg.share(layer.relative / longest)})
        svg.mark(root, level, x="84%", y=top + 10.5)
        place = {"class": "value end", "x": "100%", "y": top + 15}
        svg.add(root, "text", place, percent(layer.relative))
    return svg.written(root)


def layer_strip(layers: Sequence[LayerMLoss], cutoffs: Cutoffs) -> str:
    """Draw all layers as one strip for the head of the page: higher and warmer is worse."""
    height = 40
    highest = max(max(layer.relative for layer in layers), cutoffs.poor) or 1.0
    counts = level_counts(layers, cutoffs)
    told = ", ".join(f"{count} {level}" for level, count in counts.items())
    root = svg.figure("strip", f"{counted(len(layers), 'layer')}: {told}", height)
    wide = 1 / len(layers)
    for index, layer in enumerate(layers):
        level = cutoffs.level(layer.relative)
        tall = max((height - 2) * layer.relative / highest, 2)
        place = {"x": svg.share(wide * (index + 0.1)), "width": svg.share(wide * 0.8)}
        group = svg.add(root, "g", {"class": "row"})
        svg.tip(group, f"{layer.layer}: M-Loss {percent(layer.relative)}, {level}")
        svg.add(group, "rect", {"class": "reach", "y": 0, "height": height, **place})
        bar = {"class": f"bar {level}", "y": height - tall, "height": tall, "rx": 1, **place}
        svg.add(group, "rect", bar)
    return svg.written(root)


def node_map(layers: Sequence[LayerMLoss]) -> str:
    """Draw M-Loss by node: a row a layer, a cell a group of nodes, a logarithmic shade."""
    row = 19
    drawn = [(layer, node_groups(layer)) for layer in layers if layer.node]
    low, high = shade_range(layers)
    root = svg.figure(
        "nodes",
        f"M-Loss of groups of nodes in {counted(len(drawn), 'layer')}, up to {number(high)}",
        row * len(drawn),
    )
    plot = svg.add(root, "svg", {"class": "plot", "x": "34%", "width": "66%", "height": "100%"})
    for index, (layer, groups) in enumerate(drawn):
        svg.label(root, layer.layer, y=index * row + 13.5, wide=WIDE, narrow=NARROW)
        for column, group in enumerate(groups):
            cell = svg.add(
                plot,
                "rect",
                {
                    "class": f"cell shade-{shade(group.value, low, high)}",
                    "x": svg.share(column / len(groups)),
                    "y": index * row + 1,
                    "width": svg.share(1 / len(groups)),
                    "height": row - 2,
                },
            )
            svg.tip(cell, f"{layer.layer}, {_span(group)}: M-Loss {number(group.value)}")
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


def shade_range(layers: Sequence[LayerMLoss]) -> tuple[float, float]:
    """Return the smallest and largest group value that the node map's shades tell apart."""
    values = [g.value for layer in layers for g in node_groups(layer) if g.value > 0]
    if not values:
        return 0.0, 0.0
    return max(min(values), max(values) * 10.0**-DECADES), max(values)


def shade(value: float, low: float, high: float) -> int:
    """Return the shade of a value: 0 for exactly zero, else 1 to SHADES, logarithmic."""
    if value <= 0:
        return 0
    if high <= low or value <= low:
        return 1 if high > low else SHADES
    place = math.log(value / low) / math.log(high / low)
    return min(1 + int(place * SHADES), SHADES)


def cosine_tone(value: float | None) -> str:
    """Return a cell's colour class: its sign, and how many of the COSINE_STEPS it passes."""
    if value is None:
        return "none"
    passed = sum(abs(value) >= step for step in COSINE_STEPS)
    return f"{'plus' if value >= 0 else 'minus'}-{passed}"


def level_counts(layers: Sequence[LayerMLoss], cutoffs: Cutoffs) -> dict[Level, int]:
    """Return how many layers are good, fair and poor; absent levels are left out."""
    found = [cutoffs.level(layer.relative) for layer in layers]
    order: tuple[Level, ...] = ("good", "fair", "poor")
    return {level: found.count(level) for level in order if level in found}


def _whisker(group: Element, spread: tuple[float, float], middle: float) -> None:
    low, high = (svg.share(end) for end in spread)
    line = {"class": "whisker", "y1": middle, "y2": middle}
    svg.add(group, "line", {**line, "x1": low, "x2": high})
    for end in (low, high):
        cap = {"class": "whisker", "x1": end, "x2": end, "y1": middle - 4, "y2": middle + 4}
        svg.add(group, "line", cap)


def _scale_end(largest: float, cutoffs: Cutoffs) -> float:
    # Never let a hair's breadth fill the figure: the axis reaches at least the first cutoff.
    return max(largest, cutoffs.fair * 1.1) or 1.0


def _span(group: NodeGroup) -> str:
    if group.first == group.last:
        return f"node {group.first}"
    return f"nodes {group.first}–{group.last}"


def _cosine(value: float | None) -> str:
    return "undefined" if value is None else fixed(value)
