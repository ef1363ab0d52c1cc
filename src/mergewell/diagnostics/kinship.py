"""How alike are the experts' task vectors, pair by pair?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import cosines_of, distances_of, mean, pair_values, rows_of


class Kinship(Diagnostic):
    """How alike are the experts' task vectors, pair by pair?

    Pearson correlation, cosine and distance of the flattened task vectors, over the whole model;
    the mean over pairs of the correlation by tensor.

    Paper: Hu et al. 2024, "Model Kinship", arXiv:2410.12613.
    Departures: the cosine keeps its sign (the released code drops it). Kinship foretells how much a
    merge changes and not whether for the better, and the sign of its relation to accuracy differs
    between model families: it does not decide the verdict; the levels are reading aids.
    """

    decides: ClassVar[bool] = False

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the mean correlation over pairs as the value."""
        if not evidence.sums or self.objection(evidence):
            return None
        products = torch.stack([p[1:, 1:] for p in evidence.products.values()]).sum(0)
        sums = torch.stack([evidence.sums[name] for name in evidence.products]).sum(0)
        pearson = correlations(products, sums, sum(evidence.sizes[n] for n in evidence.products))
        cosines, distances = cosines_of(products), distances_of(products)
        kinship = mean(pair_values(pearson))
        by_place = {
            name: mean(pair_values(correlations(p[1:, 1:], evidence.sums[name], size)))
            for name, p in evidence.products.items()
            if (size := evidence.sizes[name]) > 1
        }
        by_place = {name: value for name, value in by_place.items() if value == value}
        least = min(by_place, key=by_place.__getitem__, default="")
        return Finding(
            question="How alike are the experts' task vectors?",
            verdict=(
                f"Pairs of task vectors correlate by {kinship:.2f} on average"
                + (f", least in {least} ({by_place[least]:.2f})." if least else ".")
            ),
            level=level_of(-kinship, good=0.05, poor=0.2),
            where=least,
            value=kinship,
            unit="Pearson correlation, mean over pairs",
            advice=(
                "These experts are nearly one model: merging them will change little."
                if kinship >= 0.9
                else "The experts pull in opposite directions: elect signs (ties) or merge fewer."
                if kinship < 0
                else ""
            ),
            predictors={
                "kinship": kinship,
                "kinship_pearson": rows_of(pearson),
                "kinship_cosine": rows_of(cosines),
                "kinship_distance": rows_of(distances),
                "kinship_distance_mean": mean(pair_values(distances)),
            },
            by_place=by_place,
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why no pair can be compared."""
        moved = [bool((p.diagonal()[1:] > 0).any()) for p in evidence.products.values()]
        products = torch.stack([p[1:, 1:] for p in evidence.products.values()]).sum(0)
        if len(products) < 2:
            return "Kinship compares experts, and there is only one."
        if not any(moved) or int((products.diagonal() > 0).sum()) < 2:
            return "Kinship compares task vectors, and fewer than two experts moved."
        return ""


def correlations(products: Tensor, sums: Tensor, size: int) -> Tensor:
    """Return Pearson correlations of K vectors of `size` entries, [K, K]; nan of constant ones."""
    covariance = products - sums[:, None] * sums / size
    variances = covariance.diagonal()
    # what rounding leaves of a constant vector's variance is not a variance
    real = variances > 1e-12 * products.diagonal()
    return cosines_of(torch.where(real[:, None] & real, covariance, 0.0))
