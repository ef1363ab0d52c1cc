"""Diagnostic: one question about some experts, answered in words and in a number.

Shapes: K experts; M = K + 1 models, the base first; P = K + 2 models, the base first and the merged
model last; N samples, D features, C outputs, S tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from mergewell.component import Component, Family
from mergewell.models.barrier import Path
from mergewell.models.gradients import Gradients
from mergewell.statistics.subspaces import MatrixSubspaces

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

    @property
    def kind(self) -> str:
        """What the layer is: `activation`, ..., or a whole `block`, or the `output`."""
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
    """The pairs' opposed and whole mass, [2, K, K] for each tensor (`TaskVectorSums`)."""

    layers: Sequence[LayerLoss] = ()
    """M-Loss by layer; empty without data."""

    output_gap: float | None = None
    """Gap between merged and ensembled outputs, a fraction; None without data."""

    sums: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Sums of the task vectors' entries, [K] for each tensor."""

    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Elements of each tensor."""

    top_conflicts: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The pairs' opposed and compared large entries, [2, K, K] (statistic `TopConflict`)."""

    subspaces: Mapping[str, MatrixSubspaces] = field(default_factory=dict[str, MatrixSubspaces])
    """Subspaces of the task matrices, by tensor (`diagnostics.ops.measure_matrices`)."""

    unmeasured: Mapping[str, str] = field(default_factory=dict[str, str])
    """Tensors of two dimensions and more whose subspaces were not measured, and why."""

    coefficients: tuple[float, ...] | None = None
    """The experts' shares in the ensemble, on the simplex; None is 1/K each."""

    features: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Pooled output of each block, every model on its own path, [P, N, D], in forward order."""

    outputs: Tensor | None = None
    """Output of every model, [P, N, C]."""

    logits: bool = False
    """True where `outputs` are logits, so that the largest is an answer."""

    labels: Tensor | None = None
    """Right answers, int64 [N], -100 where there is none; None without labels."""

    paths: Sequence[Path] = ()
    """Losses along straight lines between models."""

    gradients: Sequence[Gradients] = ()
    """Inner products of the experts' gradients, at one or more points."""

    accuracy: Tensor | None = None
    """Accuracy of expert i on the task of expert j, [K, K]; nan where it was not measured."""

    base_accuracy: Tensor | None = None
    """Accuracy of the base on the task of each expert, [K]."""


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

    by_place: Mapping[str, float] = field(default_factory=dict[str, float])
    """The value by tensor or block, where it has one in each."""

    def as_data(self) -> dict[str, Any]:
        """Return the finding as plain data, without the predictors."""
        return {key: value for key, value in asdict(self).items() if key != "predictors"}


class Diagnostic(Component):
    """One question that helps to say whether models will merge."""

    decides: ClassVar[bool] = True
    """False where the number is known to be a weak predictor, so that the verdict passes it by."""

    asks: ClassVar[str] = ""
    """What it asks for beside weights and where that comes from, a sentence; empty for weights."""

    @abstractmethod
    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the answer, or None when the evidence for it was not gathered or is too little."""

    def objection(self, evidence: Evidence) -> str:
        """Return why gathered evidence is too little, in one sentence; empty where it is not.

        `measure` gives None where this is not empty.
        """
        del evidence
        return ""


DIAGNOSTICS: Family[Diagnostic] = Family("mergewell.diagnostics", Diagnostic, "diagnostic")
"""All diagnostics, by name."""


def level_of(value: float, *, good: float, poor: float) -> Level:
    """Return the level of a number that is better when it is smaller."""
    return "good" if value < good else "fair" if value < poor else "poor"
