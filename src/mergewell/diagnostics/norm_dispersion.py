"""How far apart do the experts lie around their mean?"""

from __future__ import annotations

from typing import ClassVar

import torch

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean, percent


class NormDispersion(Diagnostic):
    """How far apart do the experts lie around their mean?

    V = mean_j ||theta_j - mean theta||^2 = mean_j ||tau_j||^2 - ||mean_j tau_j||^2, as a share of
    ||theta_0||^2 over the tensors that some expert moved, and the norms' coefficient of variation.
    By Taylor's theorem the averaged model is within beta / 2 * V of the ensemble, beta a bound on
    the curvature of the network's output.

    Paper: a consequence of Wang et al. 2026, arXiv:2602.08564 (derived in papers.md 1.3.3 c).
    Departures: beta is unknown, so V orders merges of one base and says nothing between bases; the
    levels are reading aids. Norms are weak predictors, so it does not decide the verdict.
    """

    decides: ClassVar[bool] = False

    def measure(self, evidence: Evidence) -> Finding:
        """Return the dispersion's share of the base's squared norm as the value."""
        moved = {n: p for n, p in evidence.products.items() if bool((p.diagonal()[1:] > 0).any())}
        summed = torch.stack(list((moved or evidence.products).values())).sum(0)
        whole = float(summed[0, 0]) or 1.0
        dispersion = _dispersion(summed)
        norms = [float(square) ** 0.5 for square in summed.diagonal()[1:].clamp(min=0)]
        middle = mean(norms)
        spread = (mean([(n - middle) ** 2 for n in norms])) ** 0.5 / middle if middle > 0 else 0.0
        by_place = {n: _dispersion(p) / whole for n, p in moved.items()}
        widest = max(by_place, key=by_place.__getitem__, default="")
        share = dispersion / whole
        return Finding(
            question="How far apart do the experts lie around their mean?",
            verdict=(
                f"The experts lie {percent(share**0.5)} of the base's norm from their mean; their "
                f"task vectors' norms vary by {percent(spread)}."
            ),
            level=level_of(share**0.5, good=0.03, poor=0.1),
            where=widest,
            value=share,
            unit="fraction of the base's squared norm",
            advice=(
                "Averaging experts this far apart relies on luck: fine-tune with a lower learning "
                "rate, or merge fewer of them."
                if share**0.5 >= 0.1
                else ""
            ),
            predictors={
                "dispersion": dispersion,
                "dispersion_share": share,
                "norm_variation": spread,
            },
            by_place=by_place,
        )


def _dispersion(products: torch.Tensor) -> float:
    """Return mean ||tau||^2 - ||mean tau||^2 of inner products whose first row is the base's."""
    taus = products[1:, 1:]
    return max(0.0, float(taus.diagonal().mean() - taus.mean()))
