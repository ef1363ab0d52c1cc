"""What a check expects of the merge: sentences, a table, and a figure over what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergewell.report import svg
from mergewell.report.numbers import listed
from mergewell.report.results import Check, Record

WORDS: Mapping[str, str] = {
    "weights": "from the weights alone",
    "unlabelled": "from 16 unlabelled inputs of each task",
    "labelled": "from 16 labelled inputs of each task",
}


_MOVED = "how far they moved from the base"
_WORDS: Mapping[str, str] = {
    "w_norm": _MOVED, "w_away_base": _MOVED, "w_merged_norm": _MOVED, "w_norm_largest": _MOVED,
    "w_base": _MOVED, "w_experts": "how many they are", "u_chance": "the number of classes",
    "w_norm_ratio": "how differently far they moved",
}  # fmt: skip
_REST = {
    "w_": "how their task vectors lie to one another", "u_": "what they answer",
    "l_": "how often they are right", "me": "what they answer",
}  # fmt: skip
"""What features are about, as a reader would say it."""


_ALARMS: Mapping[str, str] = {
    "w_base": "it has little of this base, as a model of another base or with its units in "
    "another order",
    "w_norm": "it moved far further than experts do that merge",
    "u_kl_base_own": "it answers its own inputs as unlike the base as only broken experts do",
}
"""What an alarm's feature means."""


class Range(Record):
    """A predicted retention and the interval that held 9 of 10 measured ones."""

    value: float
    low: float
    high: float


class Merge(Record):
    """What is expected of one method."""

    method: Mapping[str, str | float | int | bool | None]
    mean: Range
    experts: Mapping[str, Range]
    outside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method with its parameters, as one would say it."""
        rest = [f"{key} {value}" for key, value in self.method.items() if key != "name"]
        return " ".join([str(self.method["name"]), *([f"({', '.join(rest)})"] if rest else [])])


class Drop(Record):
    """An expert that is better left out."""

    expert: str
    gain: float


class Size(Record):
    """The best average of so many experts."""

    experts: tuple[str, ...]
    mean: float


class Prediction(Record):
    """`prediction` of `check --json`."""

    level: float
    budget: str
    merges: tuple[Merge, ...]
    drop: Drop | None = None
    sizes: tuple[Size, ...] = ()
    alarms: Mapping[str, tuple[str, ...]] = {}
    fitted_to: Mapping[str, int]
    points: tuple[tuple[float, float], ...] = ()
    """Predicted and measured mean retention of merges of the atlas, each held out."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the page and the terminal say of a prediction."""

    headline: str
    lines: tuple[str, ...]
    rows: tuple[Merge, ...]


def prediction_of(check: Check) -> Prediction | None:
    """Return what a check predicts, if it does."""
    return None if check.prediction is None else Prediction.model_validate(check.prediction)


def outlook(of: Prediction) -> Outlook:
    """Return the prediction in sentences, the most important first."""
    best = of.merges[0]
    headline = (
        f"Expect {span(best.mean)} of the experts’ accuracy from {best.name}"
        + (f", the best of {len(of.merges)} ways to merge" if len(of.merges) > 1 else "")
        + f" ({WORDS.get(of.budget, of.budget)})."
    )
    lines: list[str] = []
    for name, why in of.alarms.items():
        said = listed(tuple(_ALARMS.get(one, one) for one in why))
        lines.append(f"Look at {name} before you merge it: {said}.")
    name, least = min(best.experts.items(), key=lambda one: one[1].value)
    if len(best.experts) > 1:
        lines.append(f"{name} keeps least: {span(least)}.")
    if of.drop is not None:
        lines.append(
            f"Without {of.drop.expert} an average of the others keeps {100 * of.drop.gain:.0f} "
            "points more of them."
        )
    if best.outside:
        lines.append(
            "These models lie outside what the prediction was fitted to "
            f"({listed(_strange(best.outside))}); take it as a guess."
        )
    facts = of.fitted_to
    lines.append(
        f"Fitted to {facts.get('merges', 0):,} measured merges of {facts.get('experts', 0):,} "
        f"experts; {100 * of.level:.0f} % of the intervals should hold what an evaluation finds."
    )
    return Outlook(headline, tuple(lines), of.merges)


def _strange(features: Sequence[str]) -> tuple[str, ...]:
    """Return what features say, in words, each once."""
    return tuple(dict.fromkeys(_WORDS.get(one, _REST[one[:2]]) for one in features))


def span(one: Range) -> str:
    """Return a retention with its interval, in percent."""
    low, high = (f"{100 * end:.0f}" for end in (one.low, one.high))
    return f"{100 * one.value:.0f} % ({low} to {high})"


def scatter(of: Prediction) -> str:
    """Draw measured over predicted mean retention, and where this merge lies."""
    height, top, bottom, left = 300.0, 10.0, 34.0, 0.1
    best = of.merges[0].mean
    inside = [(x, y) for x, y in of.points if x <= _MOST and y <= _MOST]
    least = min([best.low, *(min(point) for point in inside)], default=0.0)
    low = max(0.0, int(10 * least) / 10)

    def across(value: float) -> float:
        return left + (0.98 - left) * (min(max(value, low), _MOST) - low) / (_MOST - low)

    def down(value: float) -> float:
        part = (min(max(value, low), _MOST) - low) / (_MOST - low)
        return top + (height - top - bottom) * (1 - part)

    root = svg.figure(
        "scatter",
        f"Measured over predicted retention of {len(inside)} merges that were held out; this merge "
        f"is predicted at {span(best)}.",
        height,
    )
    for tick in _ticks(low):
        x, y = svg.share(across(tick)), down(tick)
        svg.add(root, "line", {"class": "grid", "x1": x, "x2": x, "y1": top, "y2": down(low)})
        ends = {"x1": svg.share(left), "x2": svg.share(0.98)}
        svg.add(root, "line", {"class": "grid", "y1": y, "y2": y, **ends})
        words = f"{100 * tick:.0f} %"
        svg.add(root, "text", {"class": "tick", "x": x, "y": height - 18, **_MIDDLE}, words)
        svg.add(root, "text", {"class": "tick", "x": 0, "y": y + 4}, words)
    svg.add(
        root, "line",
        {"class": "diagonal", "x1": svg.share(across(low)), "y1": down(low),
         "x2": svg.share(across(_MOST)), "y2": down(_MOST)},
    )  # fmt: skip
    for x, y in inside:
        svg.add(root, "circle", {"class": "dot", "cx": svg.share(across(x)), "cy": down(y), "r": 2})
    middle = svg.share(across(best.value))
    svg.add(
        root, "line",
        {"class": "mine", "x1": middle, "x2": middle, "y1": down(best.high), "y2": down(best.low)},
    )  # fmt: skip
    mine = svg.add(root, "circle", {"class": "mine", "cx": middle, "cy": down(best.value), "r": 6})
    svg.tip(mine, f"this merge: {span(best)}")
    said = "predicted (across), measured (up)"
    svg.add(root, "text", {"class": "tick", "x": svg.share(left), "y": height - 3}, said)
    return svg.written(root)


_MOST = 1.2
_MIDDLE = {"text-anchor": "middle"}


def _ticks(low: float) -> Sequence[float]:
    return [t / 10 for t in range(round(10 * low), round(10 * _MOST) + 1, 2)]
