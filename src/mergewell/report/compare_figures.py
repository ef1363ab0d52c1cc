"""The figures of a comparison: differences by task, and M-Loss by layer in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergewell.report import svg
from mergewell.report.figures import SHORT
from mergewell.report.layer_figures import NARROW, WIDE, axis_end
from mergewell.report.numbers import counted, percent, points


@dataclass(frozen=True, slots=True)
class Pair:
    """One layer's relative M-Loss in two merges."""

    layer: str
    one: float
    other: float


@dataclass(frozen=True, slots=True)
class Difference:
    """One number on both sides; the ends of the difference's interval where both have one."""

    name: str
    one: float
    other: float
    low: float | None = None
    high: float | None = None

    @property
    def change(self) -> float:
        """The other minus the one."""
        return self.other - self.one

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out; False without one."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def difference_chart(differences: Sequence[Difference], names: tuple[str, str]) -> str:
    """Draw each difference as a dot with its interval; left of the middle the one is better."""
    row, foot = 28, 22
    ends = [abs(end) for d in differences for end in (d.change, d.low or 0, d.high or 0)]
    reach = axis_end(max(ends)) * 1.02
    told = ", ".join(f"{d.name} {points(d.change)}" for d in differences)
    label = f"{names[1]} minus {names[0]} in percentage points: {told}"
    root = svg.figure("differences", label, row * len(differences) + foot)
    plot = svg.add(root, "svg", {"class": "plot", "x": "28%", "width": "58%", "height": "100%"})

    def x(value: float) -> str:
        return svg.share(0.5 + 0.5 * value / reach)

    for at in (-axis_end(max(ends)), 0.0, axis_end(max(ends))):
        line = {"class": "grid" if at else "zero", "x1": x(at), "x2": x(at)}
        svg.add(plot, "line", {**line, "y1": 0, "y2": row * len(differences)})
        place = {"class": "tick middle", "x": x(at), "y": row * len(differences) + 16}
        svg.add(plot, "text", place, points(at))
    for index, one in enumerate(differences):
        middle = index * row + row / 2
        svg.label(root, one.name, y=middle + 4, wide=SHORT + 3, narrow=SHORT)
        group = svg.add(plot, "g", {"class": "row"})
        shown = points(one.change)
        if one.low is not None and one.high is not None:
            shown += f" ({points(one.low)} to {points(one.high)})"
        told = f"{names[0]} {percent(one.one)}, {names[1]} {percent(one.other)}"
        svg.tip(group, f"{one.name}: {told}, difference {shown}")
        size = {"y": index * row, "width": "100%", "height": row}
        svg.add(group, "rect", {"class": "reach", **size})
        if one.low is not None and one.high is not None:
            line = {"class": "whisker", "x1": x(one.low), "x2": x(one.high)}
            svg.add(group, "line", {**line, "y1": middle, "y2": middle})
        kind = "other" if one.is_clear else "one"
        svg.add(
            group, "circle", {"class": f"spot {kind}", "cx": x(one.change), "cy": middle, "r": 4.5}
        )
        value = {"class": "value end", "x": "100%", "y": middle + 4}
        svg.add(root, "text", value, points(one.change))
    return svg.written(root)


def pair_chart(pairs: Sequence[Pair], names: tuple[str, str]) -> str:
    """Draw each layer's relative M-Loss in two merges: a ring for one, a disc for the other."""
    row, foot = 21, 22
    longest = axis_end(max(max(pair.one, pair.other) for pair in pairs))
    worse = sum(pair.other > pair.one for pair in pairs)
    root = svg.figure(
        "layers pairs",
        f"Relative M-Loss by layer: {names[1]} has more than {names[0]} in {worse} of "
        f"{counted(len(pairs), 'layer')}",
        row * len(pairs) + foot,
    )
    plot = svg.add(root, "svg", {"class": "plot", "x": "35%", "width": "44%", "height": "100%"})
    for at in (0.0, longest / 2, longest):
        x = svg.share(at / longest)
        line = {"class": "grid", "x1": x, "x2": x, "y1": 0, "y2": row * len(pairs)}
        svg.add(plot, "line", line)
        place = {"class": "tick middle", "x": x, "y": row * len(pairs) + 15}
        svg.add(plot, "text", place, percent(at, 2 if longest < 0.1 else 0))
    for index, pair in enumerate(pairs):
        top = index * row
        svg.label(root, pair.layer, y=top + 15, wide=WIDE, narrow=NARROW)
        group = svg.add(plot, "g", {"class": "row"})
        told = f"{names[0]} {percent(pair.one, 2)}, {names[1]} {percent(pair.other, 2)}"
        svg.tip(group, f"{pair.layer}: {told}")
        svg.add(group, "rect", {"class": "reach", "y": top, "width": "100%", "height": row})
        ends = [svg.share(value / longest) for value in (pair.one, pair.other)]
        line = {"class": "path", "x1": ends[0], "x2": ends[1], "y1": top + 10.5, "y2": top + 10.5}
        svg.add(group, "line", line)
        for x, kind, size in ((ends[0], "one", 4.5), (ends[1], "other", 3)):
            svg.add(
                group, "circle", {"class": f"spot {kind}", "cx": x, "cy": top + 10.5, "r": size}
            )
        place = {"class": "value end", "x": "100%", "y": top + 15}
        svg.add(root, "text", place, points(pair.other - pair.one))
    return svg.written(root)
