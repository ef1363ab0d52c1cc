"""The figures of M-Loss: by layer as bars or as a profile, and by node as a map.

What is drawn (`NodeGroup`) is plain data, so that figure and table cannot disagree. Every axis and
scale ends with the data, and the figure's numbers say where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree.ElementTree import Element

from mergewell.report import svg
from mergewell.report.numbers import counted, fine_percent, number, percent
from mergewell.report.results import Cutoffs, Kind, LayerMLoss, Level

NODE_GROUPS = 32
"""Columns of the node map: the narrowest layer of the common networks has as many nodes."""

SHADES = 7
"""Steps of the node map's colour scale, beside the one for exactly zero."""

DECADES = 3
"""Orders of magnitude that the node map tells apart; what is smaller has the palest shade."""

BARS = 48
"""Layers that get a bar each; of more, the profile shows all and bars show the worst."""

WORST = 24
"""Bars where there are too many layers for all."""

ROWS = 96
"""Rows of the node map from which they are low, and stand by kind."""

TALL, LOW, NAMED = 19, 7, 3
"""Pixels of a row of the node map, for few and many layers; which rows of many are named."""

WIDE, NARROW = 40, 19
"""Characters of a layer's name that fit a wide and a narrow page."""

KIND_ROOM = 11, 5
"""Characters of the name's room that a kind takes, on a wide and a narrow page."""

KIND_MARKS: dict[Kind, str] = {
    "activation": "act",
    "gated": "glu",
    "attention": "attn",
    "norm": "norm",
    "block": "blk",
    "output": "out",
}
"""Short names of the kinds, for narrow pages."""


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Neighbouring nodes of a layer, `first` to `last`."""

    first: int
    last: int
    value: float
    """Mean of their M-Loss, in squared units of the activation."""
    relative: float
    """Root of that as a share of the layer's output a node, which compares with other layers."""


def node_groups(layer: LayerMLoss, count: int = NODE_GROUPS) -> tuple[NodeGroup, ...]:
    """Return the layer's nodes as at most `count` groups of nearly equal size."""
    nodes = len(layer.node)
    count = min(count, nodes)
    edges = [round(index * nodes / count) for index in range(count + 1)] if count else []
    middle = math.fsum(layer.node) / nodes if nodes else 0.0
    means = [math.fsum(layer.node[i:j]) / (j - i) for i, j in pairwise(edges)]
    return tuple(
        NodeGroup(i, j - 1, mean, layer.relative * math.sqrt(mean / middle) if middle else 0.0)
        for (i, j), mean in zip(pairwise(edges), means, strict=True)
    )


def drawn_bars(layers: Sequence[LayerMLoss]) -> tuple[LayerMLoss, ...]:
    """Return the layers that get a bar: all, or the worst of many; in the network's order."""
    if len(layers) <= BARS:
        return tuple(layers)
    worst = sorted(range(len(layers)), key=lambda index: -layers[index].relative)[:WORST]
    return tuple(layers[index] for index in sorted(worst))


def axis_end(largest: float) -> float:
    """Return the least round number that holds the data: 0.0075 ends at 0.008."""
    if largest <= 0:
        return 1.0
    ten = 10.0 ** math.floor(math.log10(largest))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(step * ten for step in steps if largest <= step * ten * (1 + 1e-9))


def layer_bars(layers: Sequence[LayerMLoss], cutoffs: Cutoffs) -> str:
    """Draw relative M-Loss by layer, in the network's order; shape and colour tell the level."""
    row, foot = 21, 22
    longest = axis_end(max(layer.relative for layer in layers))
    worst = max(layers, key=lambda layer: layer.relative)
    root = svg.figure(
        "layers",
        f"Relative M-Loss of {counted(len(layers), 'layer')}; "
        f"highest {percent(worst.relative, 2)} in {worst.layer}; bars end at {_tick(longest)}",
        row * len(layers) + foot,
    )
    plot = svg.add(root, "svg", {"class": "plot", "x": "34%", "width": "47%", "height": "100%"})
    for level, at in axis_lines(longest, cutoffs):
        x = svg.share(at / longest)
        line = {"class": f"cutoff {level}", "x1": x, "x2": x, "y1": 0, "y2": row * len(layers)}
        svg.add(plot, "line", line)
        place = {"class": "tick middle", "x": x, "y": row * len(layers) + 15}
        svg.add(plot, "text", place, _tick(at))
    kinds = len({layer.kind for layer in layers}) > 1
    for index, layer in enumerate(layers):
        level, top = cutoffs.level(layer.relative), index * row
        _name(root, layer, y=top + 15, kinds=kinds)
        group = svg.add(plot, "g", {"class": "row"})
        svg.tip(
            group,
            f"{layer.layer} ({_what(layer)}, {counted(layer.nodes, 'node')}): "
            f"M-Loss {percent(layer.relative, 2)} relative, {number(layer.absolute)} absolute, "
            f"{level}",
        )
        svg.add(group, "rect", {"class": "reach", "y": top, "width": "100%", "height": row})
        bar = {"class": f"bar {level}", "y": top + 5, "height": row - 10, "rx": 1.5}
        svg.add(group, "rect", {**bar, "width": svg.share(layer.relative / longest)})
        svg.mark(root, level, x="84%", y=top + 10.5)
        place = {"class": "value end", "x": "100%", "y": top + 15}
        svg.add(root, "text", place, percent(layer.relative, 2 if longest < 0.1 else 1))
    return svg.written(root)


def layer_strip(layers: Sequence[LayerMLoss], cutoffs: Cutoffs, height: int = 40) -> str:
    """Draw all layers side by side, as high as the highest: higher and warmer is worse."""
    highest = max(layer.relative for layer in layers) or 1.0
    counts = level_counts(layers, cutoffs)
    told = ", ".join(f"{count} {level}" for level, count in counts.items())
    root = svg.figure("strip", f"{counted(len(layers), 'layer')}: {told}", height)
    for level, at in (("fair", cutoffs.fair), ("poor", cutoffs.poor)):
        if 0 < at < highest:
            y = height - (height - 2) * at / highest
            line = {"class": f"cutoff {level}", "x1": 0, "x2": "100%", "y1": y, "y2": y}
            svg.add(root, "line", line)
    wide = 1 / len(layers)
    for index, layer in enumerate(layers):
        level = cutoffs.level(layer.relative)
        tall = max((height - 2) * layer.relative / highest, 2)
        place = {"x": svg.share(wide * (index + 0.1)), "width": svg.share(wide * 0.8)}
        group = svg.add(root, "g", {"class": "row"})
        svg.tip(group, f"{layer.layer}: M-Loss {percent(layer.relative, 2)}, {level}")
        svg.add(group, "rect", {"class": "reach", "y": 0, "height": height, **place})
        bar = {"class": f"bar {level}", "y": height - tall, "height": tall, "rx": 1, **place}
        svg.add(group, "rect", bar)
    return svg.written(root)


def node_maps(layers: Sequence[LayerMLoss]) -> tuple[tuple[str, str], ...]:
    """Return one map of all layers, or of very many a map a kind, named, with common shades."""
    drawn = [layer for layer in layers if layer.node]
    many, ends = len(drawn) > ROWS, shade_range(drawn)
    kinds = list(dict.fromkeys(layer.kind for layer in drawn)) if many else []
    if len(kinds) < 2:
        return (("", node_map(drawn, ends, many=many)),) if drawn else ()
    parts = [(kind, [layer for layer in drawn if layer.kind == kind]) for kind in kinds]
    return tuple((kind, node_map(part, ends, many=True)) for kind, part in parts)


def node_map(layers: Sequence[LayerMLoss], ends: tuple[float, float], *, many: bool = False) -> str:
    """Draw M-Loss by node: a row a layer, a cell a group of nodes, a logarithmic shade.

    `ends` are those of the shades; of `many` layers rows are low and only some are named.
    """
    drawn = [(layer, node_groups(layer)) for layer in layers if layer.node]
    row, (low_end, high_end) = LOW if many else TALL, ends
    root = svg.figure(
        "nodes many" if many else "nodes",
        f"Relative M-Loss of groups of nodes in {counted(len(drawn), 'layer')}, "
        f"up to {fine_percent(high_end)}",
        row * len(drawn) + (6 if many else 0),
    )
    plot = svg.add(root, "svg", {"class": "plot", "x": "34%", "width": "66%", "height": "100%"})
    kinds = len({layer.kind for layer, _ in drawn}) > 1
    gap = 0 if many else 1
    for index, (layer, groups) in enumerate(drawn):
        if not many or index % NAMED == 0:
            _name(root, layer, y=index * row + (8 if many else 13.5), kinds=kinds)
        held = svg.add(plot, "g", {})
        for column, group in enumerate(groups):
            cell = svg.add(
                held,
                "rect",
                {
                    "class": f"cell shade-{shade(group.relative, low_end, high_end)}",
                    "x": svg.share(column / len(groups)),
                    "y": index * row + gap,
                    "width": svg.share(1 / len(groups)),
                    "height": row - 2 * gap,
                },
            )
            svg.tip(cell, f"{layer.layer}, {_span(group)}: M-Loss {fine_percent(group.relative)}")
    return svg.written(root)


def shade_range(layers: Sequence[LayerMLoss]) -> tuple[float, float]:
    """Return the smallest and largest group value that the node map's shades tell apart."""
    values = [g.relative for layer in layers for g in node_groups(layer) if g.relative > 0]
    if not values:
        return 0.0, 0.0
    return max(min(values), max(values) * 10.0**-DECADES), max(values)


def shade_edges(low: float, high: float) -> tuple[float, ...]:
    """Return where the shades meet, from the low end to the high one; empty without a range."""
    if not 0 < low < high:
        return ()
    return tuple(low * (high / low) ** (step / SHADES) for step in range(SHADES + 1))


def shade(value: float, low: float, high: float) -> int:
    """Return the shade of a value: 0 for exactly zero, else 1 to SHADES, logarithmic."""
    if value <= 0:
        return 0
    if high <= low or value <= low:
        return 1 if high > low else SHADES
    place = math.log(value / low) / math.log(high / low)
    return min(1 + int(place * SHADES), SHADES)


def level_counts(layers: Sequence[LayerMLoss], cutoffs: Cutoffs) -> dict[Level, int]:
    """Return how many layers are good, fair and poor; absent levels are left out."""
    found = [cutoffs.level(layer.relative) for layer in layers]
    order: tuple[Level, ...] = ("good", "fair", "poor")
    return {level: found.count(level) for level in order if level in found}


def axis_lines(longest: float, cutoffs: Cutoffs) -> list[tuple[str, float]]:
    """Return the lines of an axis: the cutoffs that it holds, else its half and its end."""
    inside = [(name, at) for name, at in cutoffs if 0 < at < longest]
    return inside or [("plain", longest / 2), ("plain", longest)]


def _name(root: Element, layer: LayerMLoss, *, y: float, kinds: bool) -> None:
    wide, narrow = KIND_ROOM if kinds else (0, 0)
    svg.label(root, layer.layer, y=y, wide=WIDE - wide, narrow=NARROW - narrow)
    if kinds:
        end = {"class": "name kind end wide", "x": "33%", "y": y}
        svg.add(root, "text", end, layer.kind)
        end = {"class": "name kind end narrow", "x": "33%", "y": y}
        svg.add(root, "text", end, KIND_MARKS[layer.kind])


def _what(layer: LayerMLoss) -> str:
    return (
        layer.activation if layer.activation == layer.kind else f"{layer.kind} {layer.activation}"
    )


def _tick(value: float) -> str:
    whole = abs(100 * value - round(100 * value)) < 1e-6
    return percent(value, 0) if whole else fine_percent(value)


def _span(group: NodeGroup) -> str:
    if group.first == group.last:
        return f"node {group.first}"
    return f"nodes {group.first}–{group.last}"
