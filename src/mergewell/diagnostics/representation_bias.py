"""How far are the merged features from each expert's?"""

from __future__ import annotations

from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean, percent


class RepresentationBias(Diagnostic):
    """How far are the merged features from each expert's?

    bias_k = mean |Z_merged - Z_k| over samples and features; as a fraction of mean |Z_k|, so that
    blocks can be compared; beside it ||Z_merged - Z_k|| / ||Z_k||. The value is of the last block.

    Paper: Yang et al. 2024, "Representation Surgery", arXiv:2402.02705, section 3.
    Departures: relative; over all inputs, since nobody says which are of which expert's task (the
    paper takes each task's own), which punishes experts of many tasks for differing at all. Merges
    that are better than the ensemble are far from every expert too, so it does not decide the
    verdict; the levels are reading aids.
    """

    decides: ClassVar[bool] = False
    asks: ClassVar[str] = "Asks for inputs (`--data`)."

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the mean over experts at the last block as the value."""
        if not evidence.features or self.objection(evidence):
            return None
        names = evidence.experts
        biases = {place: _biases(models) for place, models in evidence.features.items()}
        by_place = {place: mean(one) for place, (one, _) in biases.items()}
        by_place = {place: value for place, value in by_place.items() if isfinite(value)}
        last = list(evidence.features)[-1]
        each = dict(zip(names, biases[last][0], strict=True))
        value = by_place[last]
        farthest = max(each, key=each.__getitem__)
        return Finding(
            question="How far are the merged features from each expert's?",
            verdict=(
                f"At {last} the merged features are {percent(value)} away from an expert's, "
                f"farthest from those of {farthest} ({percent(each[farthest])})."
            ),
            level=level_of(value, good=0.2, poor=0.6),
            where=last,
            value=value,
            unit="fraction of the expert's mean magnitude",
            advice=(
                f"Raise the coefficient of {farthest}, or correct the features after the merge "
                "(representation surgery)."
                if value >= 0.2
                else ""
            ),
            predictors={
                "representation_bias": value,
                "representation_bias_expert": each,
                "representation_bias_l2": mean(biases[last][1]),
            },
            by_place=by_place,
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why there is no magnitude to compare with."""
        if not evidence.features:
            return ""
        last, models = list(evidence.features.items())[-1]
        if not bool((models[1:-1].abs().amax((1, 2)) > 0).all()):
            return f"Representation bias is relative, and an expert's features at {last} are zero."
        return ""


def _biases(models: Tensor) -> tuple[list[float], list[float]]:
    """Return relative L1 and L2 biases of features [P, N, D] by expert; not finite beside zeros."""
    wide = models.to(torch.float64)
    gaps = wide[-1] - wide[1:-1]
    one = gaps.abs().mean((1, 2)) / wide[1:-1].abs().mean((1, 2))
    two = (gaps.square().sum((1, 2)) / wide[1:-1].square().sum((1, 2))).sqrt()
    return [float(bias) for bias in one], [float(bias) for bias in two]
