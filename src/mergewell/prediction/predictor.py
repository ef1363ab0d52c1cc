"""The shipped predictor: retention of each expert and of the merge, with intervals.

It was fitted to the atlas (`benchmarks/atlas`, docs/studies/prediction.md); the numbers lie beside
this file, one for each budget. Shapes: K experts, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from mergewell.prediction.forest import Forest, Numbers, rows_of

Budget = Literal["weights", "unlabelled", "labelled"]
"""Weights alone; 16 unlabelled inputs of each expert's task; these with their labels."""

LEVEL = 0.9
"""Level of the intervals."""

LEAST = 0.01
"""Least half-width of an interval."""

MEANS = (
    "u_cka_own", "u_agreement_own", "u_kl_own", "u_held_mix", "u_mutual", "u_cka_said", "u_conf",
)  # fmt: skip
"""Features of an expert whose mean over the merge's experts is one too: `with_means`."""

_FORESTS = ("retention", "spread")
_TOP = 1.5


@dataclass(frozen=True, slots=True)
class Range:
    """A predicted number and the interval that holds 90 % of what was measured."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Predicted:
    """What is expected of one merge."""

    mean: Range
    """Mean over experts of merged accuracy / expert accuracy."""

    experts: tuple[Range, ...]
    alarms: tuple[tuple[str, ...], ...]
    """For each expert the features that say it is unfit to merge with the others."""

    outside: tuple[str, ...]
    """Features that lie outside everything that the predictor was fitted to."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """One fitted budget."""

    budget: Budget
    features: tuple[str, ...]
    retention: Forest
    spread: Forest
    least: Numbers
    """Smallest and largest value of each feature that was fitted to, [F]."""
    most: Numbers
    facts: Mapping[str, Any]
    """Quantiles of the intervals, thresholds of the alarms, and what it was fitted to."""

    def __call__(self, experts: Sequence[Mapping[str, float]]) -> Predicted:
        """Return what is expected of a merge from the features of each expert in it."""
        rows = rows_of(self.features, with_means(experts))
        values = self.retention(rows).clip(0, _TOP)
        widths = self.widths(rows, values)
        low, high = self.facts["quantiles"]["expert"]
        each = tuple(_range(v, w, low, high) for v, w in zip(values, widths, strict=True))
        low, high = self.facts["quantiles"][size_class(len(experts))]
        with np.errstate(invalid="ignore"):
            beyond = np.any((rows < self.least) | (rows > self.most), axis=0)
        return Predicted(
            _range(float(values.mean()), float(widths.mean()), low, high),
            each,
            tuple(self._alarms(one) for one in experts),
            tuple(self.features[index] for index in np.flatnonzero(beyond)),
        )

    def _alarms(self, expert: Mapping[str, float]) -> tuple[str, ...]:
        """Return what is beyond its threshold: a sign and an end for each of a few features."""
        return tuple(
            name
            for name, (sign, end) in self.facts["alarms"].items()
            if sign * expert.get(name, np.nan) > sign * end
        )

    def widths(self, rows: Numbers, values: Numbers) -> Numbers:
        """Return how far off each prediction usually is."""
        return self.spread(np.column_stack([rows, values])).clip(LEAST)

    def to_bytes(self) -> bytes:
        """Return the predictor as a safetensors file."""
        arrays: dict[str, NDArray[Any]] = {"least": self.least, "most": self.most}
        for name in _FORESTS:
            parts = getattr(self, name).as_arrays()
            arrays |= {f"{name}.{part}": value for part, value in parts.items()}
        facts = {"budget": self.budget, "features": list(self.features), **self.facts}
        return save(arrays, metadata={"predictor": json.dumps(facts, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Predictor:
        """Return the predictor of `to_bytes`."""
        arrays = load(data)
        size = int.from_bytes(data[:8], "little")
        facts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["predictor"])
        forests = {
            name: Forest.of(
                {k.removeprefix(f"{name}."): v for k, v in arrays.items() if k.startswith(name)}
            )
            for name in _FORESTS
        }
        return cls(
            budget=facts.pop("budget"), features=tuple(facts.pop("features")), **forests,
            least=arrays["least"], most=arrays["most"], facts=facts,
        )  # fmt: skip


def with_means(experts: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the features of a merge's experts with means over the experts beside them."""
    held = {name: [e[name] for e in experts if name in e] for name in MEANS}
    means = {f"mean_{name}": sum(some) / len(some) for name, some in held.items() if some}
    return [{**one, **means} for one in experts]


def size_class(experts: int) -> str:
    """Return which quantiles hold for the mean over so many experts."""
    return "mean of 2" if experts < 3 else "mean of 3 to 4" if experts < 5 else "mean of 5 to 8"


@cache
def shipped(budget: Budget) -> Predictor:
    """Return the fitted predictor of a budget."""
    assert budget in get_args(Budget)
    return Predictor.from_bytes(
        files("mergewell.prediction").joinpath("data", f"{budget}.safetensors").read_bytes()
    )


def _range(value: float, width: float, low: float, high: float) -> Range:
    return Range(float(value), max(0.0, float(value + low * width)), float(value + high * width))
