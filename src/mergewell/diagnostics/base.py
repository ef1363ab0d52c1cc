"""Diagnostic: one question about some experts, answered in words and in a number.

Shapes: K experts; M = K + 1 models, the base first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from mergewell.component import Component, Family

Level = Literal["good", "fair", "poor"]


class LayerLoss(Protocol):
    """What a diagnostic reads of one layer's M-Loss."""

    @property
    def layer(self) -> str:
        """The layer's name."""
        ...

    @property
    def relative(self) -> float:
        """Relative layer M-Loss, a fraction of the ensemble's norm."""
        ...


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured, for the diagnostics to read."""

    experts: tuple[str, ...]
    """The experts' short names."""

    products: Mapping[str, Tensor]
    """Inner products of the base and the task vectors, [M, M] for each tensor."""

    conflict_mass: Mapping[str, Tensor]
    """What remains of the mass when the task vectors are added, and what there was, [2] each."""

    conflict_pairs: Mapping[str, Tensor]
    """The pairs' opposed and whole mass, [2, K, K] for each tensor."""

    layers: Sequence[LayerLoss] = ()
    """M-Loss by layer; empty without data."""

    output_gap: float | None = None
    """Gap between merged and ensembled outputs, a fraction; None without data."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to a diagnostic's question."""

    question: str
    verdict: str
    level: Level
    where: str
    value: float
    unit: str
    advice: str
    predictors: Mapping[str, Any]
    """Numbers or matrices (nested lists) for a prediction, by name."""

    def as_data(self) -> dict[str, Any]:
        """Return the finding as plain data, without the predictors."""
        return {key: value for key, value in asdict(self).items() if key != "predictors"}


class Diagnostic(Component):
    """One question that helps to say whether models will merge."""

    @abstractmethod
    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the answer, or None when the evidence for it was not gathered."""


DIAGNOSTICS: Family[Diagnostic] = Family("mergewell.diagnostics", Diagnostic, "diagnostic")
"""All diagnostics, by name."""


def level_of(value: float, *, good: float, poor: float) -> Level:
    """Return the level of a number that is better when it is smaller."""
    return "good" if value < good else "fair" if value < poor else "poor"
