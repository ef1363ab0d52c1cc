"""The picture of a benchmark: a dot with its interval for each method, best first.

Methods with fewer seeds than the others say so: their seeds may be the easier or the harder ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

from summary import Method

from mergewell.report.svg import add, written

LEFT, WIDTH, ROW, TOP = 230, 820, 17, 34
COLOURS = {"weights": "#1f6feb", "unlabelled": "#bf5700", "labelled": "#6e7781"}
MARKS = {"labels": "filled", "unlabelled": "hollow"}


def draw(
    path: Path, title: str, methods: list[Method], lines: Mapping[str, float], *, better: int
) -> None:
    """Write the picture; `lines` are values to compare with, such as the ensemble's.

    `better` is 1 where higher is better, or else -1.
    """
    rows = sorted(methods, key=lambda method: -better * method.lines["labels"].mean)
    seeds = max(len(method.lines["labels"].seeds) for method in methods)
    values = [*lines.values(), *(m.lines["labels"].low for m in rows)]
    values += [m.lines["labels"].high for m in rows]
    values += [end for m in rows for line in m.lines.values() for end in line.spread]
    low, high = min(values), max(values)
    height = TOP + ROW * len(rows) + 40

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return LEFT + 10 + share * (WIDTH - LEFT - 30)

    root = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}",
            "width": str(WIDTH), "height": str(height), "role": "img", "aria-label": title,
            "font-family": "sans-serif", "font-size": "11",
        },
    )  # fmt: skip
    add(root, "rect", {"width": WIDTH, "height": height, "fill": "white"})
    for place, (name, value) in enumerate(lines.items()):
        at = x(value)
        stroke = {"stroke": "#888", "stroke-dasharray": "3 3"}
        add(root, "line", {"x1": at, "x2": at, "y1": TOP - 4, "y2": height - 36, **stroke})
        y = 12 + 11 * (place % 2)
        add(root, "text", {"x": at, "y": y, "text-anchor": "middle", "fill": "#555"}, name)
    for number, method in enumerate(rows):
        y = TOP + ROW * number + ROW / 2
        colour = COLOURS[method.data]
        count = len(method.lines["labels"].seeds)
        name = method.name if count == seeds else f"{method.name} ({count} of {seeds} seeds)"
        add(root, "text", {"x": LEFT, "y": y + 4, "text-anchor": "end"}, name)
        for tuning, line in method.lines.items():
            if tuning == "labels":
                ends = {"x1": x(line.low), "x2": x(line.high), "y1": y, "y2": y}
                add(root, "line", {**ends, "stroke": colour, "stroke-width": 1.5})
                for value in line.spread if count > 1 else ():
                    tick = {"x1": x(value), "x2": x(value), "y1": y - 5, "y2": y + 5}
                    add(root, "line", {**tick, "stroke": colour})
            fill = colour if tuning == "labels" else "white"
            circle = {"cx": x(line.mean), "cy": y, "r": 4 if tuning == "labels" else 3}
            add(root, "circle", {**circle, "fill": fill, "stroke": colour})
    for share in range(5):
        value = low + (high - low) * share / 4
        spot = {"x": x(value), "y": height - 20, "text-anchor": "middle", "fill": "#555"}
        add(root, "text", spot, f"{value:.1f}")
    legend = "filled: tuned with labels, 95 % over examples, ticks: worst and best seed; "
    legend += "hollow: without labels. "
    legend += "blue: weights only; orange: unlabelled inputs; grey: labelled."
    add(root, "text", {"x": 10, "y": height - 5, "fill": "#555"}, legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written(root) + "\n", encoding="utf-8")
