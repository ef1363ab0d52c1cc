"""The figures of `mergewell explain`: bars of the ways, parts of the gap, curves, and templates.

Each is a pure function from the analyses to one SVG; widths are percentages, heights pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mergewell.evaluate import Estimate
from mergewell.explain.averaging import BatchNorm, Decomposition, Variant, Way
from mergewell.explain.stability import Point, Subject
from mergewell.explain.templates import Templates
from mergewell.report import svg
from mergewell.report.figures import Kind, Series, accuracy_bars, cosine_tone
from mergewell.report.numbers import fixed, percent

WAYS: Mapping[Way, str] = {
    "single": "expert",
    "uniform_soup": "soup",
    "logit_ensemble": "logits",
    "feature_ensemble_first_head": "features, 1st",
    "feature_ensemble_mean_head": "features, mean",
    "greedy_soup": "greedy soup",
    "greedy_soup_in_order": "soup in order",
    "selected_logit_ensemble": "greedy logits",
    "selected_feature_ensemble": "greedy features",
}
"""Short names that fit beside a bar."""

SUBJECTS: Mapping[Subject, str] = {
    "single": "first expert",
    "soup": "soup",
    "logit_ensemble": "ensemble of logits",
    "feature_ensemble_mean_head": "ensemble of features, averaged classifier",
    "feature_ensemble_first_head": "ensemble of features, first classifier",
}

_KINDS: Mapping[Way, Kind] = {
    "single": "expert",
    "uniform_soup": "best",
    "greedy_soup": "merge",
    "greedy_soup_in_order": "merge",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart: agreement by amount."""

    subject: Subject
    points: tuple[tuple[float, float], ...]


def way_name(variant: Variant) -> str:
    """Return the name of a row: an expert's own, or the way; an asterisk marks new BatchNorms."""
    name = variant.members[0] if variant.way == "single" else WAYS[variant.way]
    return f"{name} *" if variant.batch_norm == "reestimated" else name


def value_of(variant: Variant) -> Estimate:
    """Return the accuracy, or the agreement with the ensemble where there are no labels."""
    return variant.accuracy or variant.agreement


def way_bars(variants: Sequence[Variant], *, title: str) -> str:
    """Draw every way to combine the experts as a bar from 0 to 100 % with its interval."""
    series = [
        Series(
            way_name(variant),
            _KINDS.get(variant.way, "ensemble"),
            {title: value_of(variant).value},
            {title: (value_of(variant).low, value_of(variant).high)},
        )
        for variant in variants
    ]
    return accuracy_bars(series, title, title=title)


def part_bars(parts: Sequence[Decomposition]) -> str:
    """Draw the parts of the gap between soup and ensemble, as fractions of the ensemble's norm."""
    rows = [
        (f"{name}{' *' if part.batch_norm == 'reestimated' else ''}", value, kind)
        for part in parts
        for name, value, kind in (
            ("nonlinearity", part.nonlinearity, "best"),
            ("covariance", part.covariance, "merge"),
            ("together", part.difference, "expert"),
        )
    ]
    row = 26
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    told = ", ".join(f"{name} {percent(value)}" for name, value, _ in rows)
    root = svg.figure("bars parts", f"Gap between soup and ensemble: {told}", row * len(rows) + 4)
    plot = svg.add(root, "svg", {"class": "plot", "x": "28%", "width": "56%", "height": "100%"})
    for index, (name, value, kind) in enumerate(rows):
        top = index * row + 2
        svg.label(root, name, y=top + 16, wide=20, narrow=17)
        group = svg.add(plot, "g", {"class": "row"})
        svg.tip(group, f"{name}: {percent(value, 2)} of the ensemble's norm")
        svg.add(group, "rect", {"class": "reach", "y": top, "width": "100%", "height": row})
        place = {"y": top + 5, "height": row - 10, "rx": 1.5}
        svg.add(
            group, "rect", {"class": f"bar {kind}", "width": svg.share(value / longest), **place}
        )
        end = {"class": "value end", "x": "100%", "y": top + 16}
        svg.add(root, "text", end, percent(value))
    return svg.written(root)


def curves_of(points: Sequence[Point], batch_norm: BatchNorm) -> tuple[Curve, ...]:
    """Return a line for each subject of points of one curve, in the order of the amounts."""
    subjects: dict[Subject, None] = dict.fromkeys(point.subject for point in points)
    return tuple(
        Curve(
            subject,
            tuple(
                (point.amount, point.agreement)
                for point in sorted(points, key=lambda point: point.amount)
                if point.subject == subject and point.batch_norm == batch_norm
            ),
        )
        for subject in subjects
    )


def agreement_chart(curves: Sequence[Curve], *, title: str) -> str:
    """Draw agreement with the unchanged model from 0 to 100 %; amounts stand at even distances."""
    height, foot, inset = 190, 24, 0.04
    amounts = sorted({amount for curve in curves for amount, _ in curve.points})
    places = {
        amount: inset + (1 - 2 * inset) * (index / max(len(amounts) - 1, 1))
        for index, amount in enumerate(amounts)
    }
    last = ", ".join(f"{SUBJECTS[c.subject]} {percent(c.points[-1][1])}" for c in curves)
    root = svg.figure("lines", f"{title}; at the largest amount {last}", height + foot)
    plot = svg.add(root, "svg", {"class": "plot", "x": "9%", "width": "91%", "height": "100%"})
    for quarter in range(5):
        y = _y(quarter / 4, height)
        svg.add(plot, "line", {"class": "grid", "x1": 0, "x2": "100%", "y1": y, "y2": y})
        svg.add(root, "text", {"class": "tick", "x": 0, "y": y + 4}, percent(quarter / 4, 0))
    for amount, place in places.items():
        tick = {"class": "tick middle", "x": svg.share(place), "y": height + 18}
        svg.add(plot, "text", tick, f"{amount:g}")
    for curve in curves:
        line = {"class": f"line {curve.subject}"}
        for (amount, value), (other, following) in pairwise(curve.points):
            ends = {"x1": svg.share(places[amount]), "x2": svg.share(places[other])}
            heights = {"y1": _y(value, height), "y2": _y(following, height)}
            svg.add(plot, "line", {**line, **ends, **heights})
        for amount, value in curve.points:
            dot = {"cx": svg.share(places[amount]), "cy": _y(value, height), "r": 3.2}
            point = svg.add(plot, "circle", {"class": f"dot {curve.subject}", **dot})
            svg.tip(point, f"{SUBJECTS[curve.subject]}, {amount:g}: {percent(value)}")
    return svg.written(root)


def template_map(templates: Templates) -> str:
    """Draw the cosines of rows and class means: a row a model, a column a class."""
    rows = [(name, match) for name, match in templates.experts.items()]
    rows.append(("soup", templates.merged))
    classes = list(templates.merged.cosine)
    row, head = 30, 24
    told = ", ".join(f"{name} {fixed(match.mean_cosine)}" for name, match in rows)
    room = "" if len(classes) <= 12 else " many" if len(classes) <= 20 else " crowd"
    label = f"Cosine of classifier rows and class means, mean over classes: {told}"
    root = svg.figure(f"cosines{room}", label, head + row * len(rows))
    plot = svg.add(root, "svg", {"class": "plot", "x": "22%", "width": "78%", "height": "100%"})
    for column, label in enumerate(classes):
        middle = svg.share((column + 0.5) / len(classes))
        if len(classes) <= 20:
            svg.add(plot, "text", {"class": "tick middle", "x": middle, "y": 15}, str(label))
        for index, (name, match) in enumerate(rows):
            value, top = match.cosine[label], head + row * index
            group = svg.add(plot, "g", {"class": "row"})
            svg.tip(group, f"{name}, class {label}: cosine {fixed(value)}")
            place = {"x": svg.share(column / len(classes)), "y": top}
            size = {"width": svg.share(1 / len(classes)), "height": row}
            tone = cosine_tone(value)
            svg.add(group, "rect", {"class": f"cell {tone}", **place, **size})
            inside = {"class": f"inside middle on-{tone}", "x": middle, "y": top + 20}
            svg.add(group, "text", inside, fixed(value))
    for index, (name, _) in enumerate(rows):
        svg.label(root, name, y=head + row * index + 20, wide=18, narrow=10)
    return svg.written(root)


def _y(value: float, height: float) -> float:
    return 8 + (height - 12) * (1 - value)
