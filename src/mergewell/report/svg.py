"""The little SVG that figures are made of; text is escaped by ElementTree.

Widths are percentages of the figure and heights are pixels, so a figure fills whatever room it is
given while its text keeps its size: the same drawing serves 400 and 1280 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from unicodedata import category
from xml.etree.ElementTree import Element, SubElement, tostring

from mergewell.report.results import Level

LEVEL_SHAPES: Mapping[Level, str] = {
    "good": "M0 -5A5 5 0 1 1 0 5A5 5 0 1 1 0 -5Z",
    "fair": "M0 -5.5L5.5 4.5L-5.5 4.5Z",
    "poor": "M-4.5 -4.5H4.5V4.5H-4.5Z",
}
"""Circle, triangle, square: a level is told by its shape as well as its colour."""

LEVEL_WORDS: Mapping[Level, str] = {"good": "good", "fair": "fair", "poor": "poor"}

Attribute = str | float


def figure(name: str, label: str, height: float) -> Element:
    """Return an empty figure as wide as its room; `label` is what a screen reader says."""
    return Element(
        "svg",
        {
            "class": f"figure {name}",
            "role": "img",
            "aria-label": clean(label),
            "width": "100%",
            "height": _shown(height),
        },
    )


def add(parent: Element, tag: str, attributes: Mapping[str, Attribute], text: str = "") -> Element:
    """Append an element and return it."""
    child = SubElement(parent, tag, {name: _shown(value) for name, value in attributes.items()})
    if text:
        child.text = clean(text)
    return child


def tip(parent: Element, text: str) -> None:
    """Give an element the value that hovering or touching it shows."""
    title = Element("title")
    title.text = clean(text)
    parent.insert(0, title)


def label(
    parent: Element, text: str, *, y: float, wide: int, narrow: int, before: str = ""
) -> None:
    """Write a row's name twice, for wide and narrow pages; CSS shows one of them."""
    for width, room in (("wide", wide), ("narrow", narrow)):
        add(parent, "text", {"class": f"name {width}", "x": 0, "y": y}, before + short(text, room))


def mark(parent: Element, level: Level, *, x: str, y: float) -> None:
    """Draw a level's shape at a place given in percent and pixels."""
    place = add(parent, "svg", {"x": x, "y": y, "class": "place"})
    add(place, "path", {"class": f"mark {level}", "d": LEVEL_SHAPES[level]})


def share(fraction: float) -> str:
    """Return a fraction of the width as an SVG percentage."""
    return f"{100 * fraction:.4f}".rstrip("0").rstrip(".") + "%"


def short(text: str, room: int) -> str:
    """Return a name that fits: outer parts by their initial, as in "b.15.depthwise_conv".

    What is still too long keeps its number and its end, which tell layers apart: "31.…projection".
    """
    parts = [part.strip("_") or part for part in text.split(".")]
    dotted = len(parts) > 1 and " " not in text and not parts[-1].isdigit()
    if len(text) <= room:
        return text
    if not dotted:
        return "…" + text[-(room - 1) :]
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > room and not part.isdigit():
            parts[index] = part[:1]
    if len(".".join(parts)) <= room:
        return ".".join(parts)
    numbered = max((index for index, part in enumerate(parts) if part.isdigit()), default=0)
    head, end = f"{parts[numbered]}.…", ".".join(parts[numbered + 1 :])
    return head + end[-(room - len(head)) :] if len(head) < room else "…" + text[-(room - 1) :]


def clean(text: str) -> str:
    """Return the text without the control characters that neither XML nor a reader can take."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(c) in "CcCs" else c for c in text)


def written(root: Element) -> str:
    """Return the figure as text."""
    return tostring(root, encoding="unicode")


def _shown(value: Attribute) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
