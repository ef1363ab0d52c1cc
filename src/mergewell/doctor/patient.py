"""Patient: the models of a merge, made or to be made, with what was read of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mergewell.doctor.probe import Probe
from mergewell.doctor.weights import TensorSums
from mergewell.plan import Plan
from mergewell.recipe import Recipe
from mergewell.storage.base import Checkpoint
from mergewell.storage.manifest import Manifest
from mergewell.tokenizers.vocabulary import Vocabulary

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The last part of the names of BatchNorm's statistics, which are measured and not trained."""


@dataclass(frozen=True)
class Model:
    """One model: the base, an expert or the result."""

    name: str
    """What messages call it."""

    checkpoint: Checkpoint
    vocabulary: Vocabulary | None = None


@dataclass(frozen=True)
class Patient:
    """What the examinations look at. Before a merge there is no result, `merged`."""

    base: Model | None
    experts: tuple[Model, ...]
    merged: Model | None = None
    recipe: Recipe | None = None
    plan: Plan | None = None
    """The recipe's plan, where one can be made."""

    refusal: str = ""
    """Why no plan can be made, a sentence."""

    manifest: Manifest | None = None
    sums: Mapping[str, TensorSums] = field(default_factory=dict[str, TensorSums])
    """Sums of the floating tensors that all models have in one shape, by tensor."""

    probe: Probe | None = None
    """What the experts and the result answer to a few inputs."""

    @property
    def reference(self) -> Model | None:
        """The base, or the first expert; None where only the result is at hand."""
        return self.base if self.base is not None else next(iter(self.experts), None)

    @property
    def models(self) -> tuple[Model, ...]:
        """The base, the experts and the result, as far as they are there."""
        found = ([self.base] if self.base is not None else []) + [*self.experts]
        return (*found, *([self.merged] if self.merged is not None else []))

    @property
    def weighed(self) -> tuple[Model, ...]:
        """The models that `sums` are of, in its order: the reference, the experts, the result."""
        first = self.reference
        after = [self.merged] if self.merged is not None else []
        return tuple(after) if first is None else (first, *self.experts, *after)

    @cached_property
    def trained(self) -> Mapping[str, TensorSums]:
        """The sums of tensors that training moves: all but BatchNorm's statistics."""
        return {n: s for n, s in self.sums.items() if n.rpartition(".")[2] not in STATISTICS}

    @cached_property
    def matrices(self) -> Mapping[str, TensorSums]:
        """The sums of matrices and kernels: vectors are alike in models that are no kin."""
        first = self.reference
        if first is None:
            return {}
        return {n: s for n, s in self.trained.items() if len(first.checkpoint.spec(n).shape) > 1}

    def total(self, sums: Mapping[str, TensorSums]) -> Tensor:
        """Return the inner products over all these tensors, [V, V], float64."""
        if not sums:
            return torch.zeros(0, 0, dtype=torch.float64)
        return torch.stack([each.products for each in sums.values()]).sum(0)


ADDING = ("task_arithmetic", "dare")
"""Methods that add task vectors up."""


def shares_of(recipe: Recipe) -> tuple[float, ...]:
    """Return what a plain merge in the manner of a recipe's method takes of each task vector.

    Exact where task vectors are added up or averaged; other methods count as a scaled mean.
    """
    method = recipe.method.build()
    given = [expert.coefficient for expert in recipe.experts]
    total, scale = sum(given), float(getattr(method, "scale", 1.0))
    divide = getattr(method, "divide", "none")
    if recipe.method.name in ADDING:
        if divide == "count":
            return tuple(scale * c / len(given) for c in given)
        if divide == "coefficients" and abs(total) > 1e-8:
            return tuple(scale * c / total for c in given)
        return tuple(scale * c for c in given)
    if not getattr(method, "normalize", True) or abs(total) < 1e-8:
        return tuple(scale * c for c in given)
    return tuple(scale * c / total for c in given)
