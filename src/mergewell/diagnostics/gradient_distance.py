"""Do the experts' tasks pull one model the same way?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import cosines_of, distances_of, mean, pair_values, rows_of
from mergewell.models.gradients import Gradients

ENOUGH = 100
"""Samples a gradient should be the mean of: of 10, its distances correlate by 0.43 with 200's."""


class GradientDistance(Diagnostic):
    """Do the experts' tasks pull one model the same way?

    g_k is the gradient of expert k's mean loss (on labels of its task, or on its own answers) at
    one common point, the base or the merged model. ||g_i - g_j|| and the cosine of each pair;
    the value is ||g_i - g_j|| / sqrt(||g_i||^2 + ||g_j||^2), the mean over pairs: 0 for equal
    gradients, 1 for orthogonal ones, sqrt(2) for opposed ones of one length.

    Paper: Zhou et al. 2026, "Demystifying Mergeability", arXiv:2601.22285.
    Departures: at a common point, where the paper takes each gradient at its own expert; relative,
    for the level only. The published single-metric correlations are -0.3 to -0.6 for the distance
    and about 0 for the cosine, and interference can be large where gradients are orthogonal, so it
    does not decide the verdict.
    """

    decides: ClassVar[bool] = False
    asks: ClassVar[str] = (
        "Asks for gradients of every task at one model: "
        "`mergewell.models.gradients.gradient_products` makes its evidence, in Python."
    )

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the relative distance at the last point given as the value."""
        if not evidence.gradients or self.objection(evidence):
            return None
        last = evidence.gradients[-1]
        products = {name: p for name, p in last.products.items() if bool((p != 0).any())}
        value = mean(pair_values(_relative(_summed(last))))
        by_place = {name: mean(pair_values(_relative(p))) for name, p in products.items()}
        by_place = {name: v for name, v in by_place.items() if v == v}
        predictors: dict[str, object] = {}
        for gradients in evidence.gradients:
            total = _summed(gradients)
            distances, cosines = distances_of(total), cosines_of(total)
            predictors |= {
                f"gradient_distance_{gradients.at}": mean(pair_values(distances)),
                f"gradient_cosine_{gradients.at}": mean(pair_values(cosines)),
                f"gradient_distances_{gradients.at}": rows_of(distances),
                f"gradient_cosines_{gradients.at}": rows_of(cosines),
            }
        few = min(last.samples)
        return Finding(
            question="Do the experts' tasks pull one model the same way?",
            verdict=(
                f"At the {last.at} model the tasks' gradients (by {last.answers}) are {value:.2f} "
                "of the distance apart that orthogonal ones would be"
                + (f", measured on only {few} samples." if few < ENOUGH else ".")
            ),
            level=level_of(value, good=0.95, poor=1.1),
            where=max(by_place, key=by_place.__getitem__, default=""),
            value=value,
            unit="times the distance of orthogonal gradients, mean over pairs",
            advice=(
                f"Take {ENOUGH} samples or more of each task: gradient distances of few samples "
                "are unreliable."
                if few < ENOUGH
                else ""
            ),
            predictors=predictors,
            by_place=by_place,
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why no two gradients can be compared."""
        for gradients in evidence.gradients:
            norms = _summed(gradients).diagonal()
            if len(norms) < 2:
                return "Gradient distances compare experts, and there is only one."
            if int((norms > 0).sum()) < 2:
                return f"At the {gradients.at} model fewer than two tasks have a gradient."
        return ""


def _summed(gradients: Gradients) -> Tensor:
    return torch.stack(list(gradients.products.values())).sum(0)


def _relative(products: Tensor) -> Tensor:
    """Return distances over those of orthogonal vectors of the same lengths; nan of two zeros."""
    squares = products.diagonal()
    return distances_of(products) / (squares[:, None] + squares).sqrt()
