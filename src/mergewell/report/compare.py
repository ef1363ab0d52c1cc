"""Compare: two merges or two checks side by side, what changed in the recipe, and what it did.

Intervals of differences are Newcombe's square-and-add of the two intervals (Zou and Donner 2008,
"Construction of confidence limits about effect measures"). They treat both sides as independent;
where both were judged on the same examples, as here, that is usually too wide and thus careful.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mergewell.report import compare_figures, findings, numbers
from mergewell.report.compare_figures import Difference, Pair
from mergewell.report.files import write_page_text
from mergewell.report.html import render
from mergewell.report.layer_figures import BARS, WORST
from mergewell.report.results import MEAN, WHOLES, Finding, LayerMLoss
from mergewell.report.side import Setting, Side, read_side


@dataclass(frozen=True, slots=True)
class Changed:
    """A setting of the recipe that is not the same; None where one side lacks it."""

    name: str
    one: Setting
    other: Setting


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sides and how they differ; differences are the other minus the one."""

    one: Side
    other: Side
    accuracy: tuple[Difference, ...]
    """By task that both have, the mean last where there are several."""
    agreement: tuple[Difference, ...]
    """Agreement with the ensemble, likewise."""
    settings: tuple[Changed, ...]
    same_settings: int
    layers: tuple[Pair, ...]
    """Relative M-Loss of the layers that both have; empty where one check stands behind both."""
    findings: tuple[tuple[Finding, Finding], ...]
    """The findings of both checks with the same question."""
    same_check: bool

    @property
    def names(self) -> tuple[str, str]:
        """The sides' names."""
        return self.one.name, self.other.name

    @property
    def mean(self) -> Difference | None:
        """The difference of the mean accuracies."""
        return self.accuracy[-1] if self.accuracy else None

    def sentence(self) -> str:
        """Return what the comparison comes to, in one sentence."""
        one, other = self.names
        mean = self.mean
        if mean is not None:
            better = other if mean.change > 0 else one
            worse = one if mean.change > 0 else other
            high, low = max(mean.one, mean.other), min(mean.one, mean.other)
            said = f"{numbers.percent(high)} against {numbers.percent(low)}"
            what = "accuracy" if len(self.accuracy) == 1 else "mean accuracy"
            if mean.one == mean.other:
                return f"{one} and {other} have the same {what}, {numbers.percent(high)}."
            if mean.is_clear:
                return f"{better} is better than {worse}: {what} {said}."
            if mean.low is None:
                return f"{better} has the higher {what}, {said}; no intervals say how sure that is."
            return (
                f"{one} and {other} cannot be told apart: {what} {said}, which is within their "
                "intervals."
            )
        if self.layers:
            more = sum(pair.other > pair.one for pair in self.layers)
            count = numbers.counted(len(self.layers), "layer")
            return f"{other} has more M-Loss than {one} in {more} of {count}."
        if self.settings:
            count = numbers.counted(len(self.settings), "setting")
            return f"The recipes of {one} and {other} differ in {count}."
        return f"Nothing was found in which {one} and {other} differ."


def compare(folder_a: Path, folder_b: Path, out: Path) -> Path:
    """Write the page that sets two merges or two checks side by side, and return its path.

    Each is a merged folder, a folder of `mergewell demo`, or a file of `mergewell check --json`.
    `out` is the page, or a folder that gets a `compare.html`.

    Raises:
        DataError: one of them holds nothing that mergewell wrote, or something broken.
        CheckpointError: a manifest is broken.
        OutputError: the page cannot be written, or something else stands there.
    """
    found = compared(*_named(read_side(folder_a), read_side(folder_b), (folder_a, folder_b)))
    path = out if out.suffix == ".html" else out / "compare.html"
    return write_page_text(path, render_comparison(found))


def compared(one: Side, other: Side) -> Comparison:
    """Return how two sides differ."""
    settings = [
        Changed(name, one.recipe.get(name), other.recipe.get(name))
        for name in dict.fromkeys((*one.recipe, *other.recipe))
    ]
    changed = tuple(
        setting
        for setting in settings
        if setting.one != setting.other
        or (setting.name in one.recipe) != (setting.name in other.recipe)
    )
    same_check = one.check is not None and one.check == other.check
    pairs = [] if same_check else _pairs(_layers(one), _layers(other))
    answers = {} if same_check or one.check is None else {f.question: f for f in one.check.findings}
    others = other.check.findings if other.check is not None else ()
    return Comparison(
        one=one,
        other=other,
        accuracy=differences(one.accuracy, other.accuracy, one.intervals, other.intervals),
        agreement=differences(one.agreement, other.agreement, {}, {}),
        settings=changed if one.recipe and other.recipe else (),
        same_settings=len(settings) - len(changed),
        layers=tuple(pairs),
        findings=tuple((answers[f.question], f) for f in others if f.question in answers),
        same_check=same_check,
    )


def differences(
    one: Mapping[str, float],
    other: Mapping[str, float],
    one_intervals: Mapping[str, tuple[float, float]],
    other_intervals: Mapping[str, tuple[float, float]],
) -> tuple[Difference, ...]:
    """Return the differences by task that both have, and last that of the means of those.

    The mean has an interval only where both sides have the same tasks: theirs is of all of them.
    """
    tasks = [task for task in one if task in other]
    rows = [(task, one[task], other[task]) for task in tasks]
    if len(tasks) > 1:
        means = [math.fsum(side[task] for task in tasks) / len(tasks) for side in (one, other)]
        rows.append((MEAN, means[0], means[1]))
    found: list[Difference] = []
    for name, a, b in rows:
        whole = name != MEAN or set(one) == set(other)
        if whole and name in one_intervals and name in other_intervals:
            low, high = square_and_add(a, b, one_intervals[name], other_intervals[name])
            found.append(Difference(name, a, b, low, high))
        else:
            found.append(Difference(name, a, b))
    return tuple(found)


def square_and_add(
    one: float,
    other: float,
    one_interval: tuple[float, float],
    other_interval: tuple[float, float],
) -> tuple[float, float]:
    """Return the interval of other - one from the intervals of both, as if independent."""
    change = other - one
    low = math.hypot(other - other_interval[0], one_interval[1] - one)
    high = math.hypot(other_interval[1] - other, one - one_interval[0])
    return change - low, change + high


def render_comparison(found: Comparison) -> str:
    """Return the page of a comparison as one HTML text."""
    return render("compare.html.jinja", {"found": found, **_drawn(found), **_facts(found)})


def _drawn(found: Comparison) -> dict[str, Any]:
    shown = found.layers
    if len(shown) > BARS:
        far = sorted(shown, key=lambda pair: -abs(pair.other - pair.one))[:WORST]
        shown = tuple(pair for pair in shown if pair in far)
    return {
        "drawn_layers": shown,
        "difference_chart": _chart(compare_figures.difference_chart, found.accuracy, found.names),
        "layer_chart": _chart(compare_figures.pair_chart, shown, found.names),
        "points": numbers.points,
        "measure": findings.measure,
        "compared_words": findings.COMPARED,
    }


def _chart(draw: Any, rows: Sequence[object], names: tuple[str, str]) -> Markup:
    return Markup(draw(rows, names) if rows else "")


def _facts(found: Comparison) -> dict[str, Any]:
    """Return what the manifests say of how the merges were made."""
    rows: dict[str, tuple[str, str]] = {}
    sides = [found.one.manifest, found.other.manifest]
    if all(sides):
        told = [
            {
                "Tensors changed": f"{m.tensors_changed:,} of {m.tensors:,}",
                "Change, relative to the base": (
                    numbers.fine_percent(m.relative_change)
                    if m.relative_change is not None
                    else "–"
                ),
                "Seed": str(m.seed),
                "Time": numbers.seconds(m.seconds),
            }
            for m in sides
            if m is not None
        ]
        rows = {name: (told[0][name], told[1][name]) for name in told[0]}
    return {"facts": rows}


def _layers(side: Side) -> tuple[LayerMLoss, ...]:
    return side.results.layers if side.results else ()


def _pairs(one: Sequence[LayerMLoss], other: Sequence[LayerMLoss]) -> list[Pair]:
    held = {(layer.layer, layer.kind): layer.relative for layer in one}
    return [
        Pair(layer.layer, held[key], layer.relative)
        for layer in other
        if (key := (layer.layer, layer.kind)) in held and layer.kind not in WHOLES
    ]


def _named(one: Side, other: Side, paths: tuple[Path, Path]) -> tuple[Side, Side]:
    """Return the sides under names that differ."""
    if one.name != other.name:
        return one, other
    names = [str(path) for path in paths] if paths[0] != paths[1] else ["first", "second"]
    return _renamed(one, names[0]), _renamed(other, names[1])


def _renamed(side: Side, name: str) -> Side:
    return Side(name, side.results, side.method, side.manifest, side.recipe)
