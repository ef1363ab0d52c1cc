"""How far did the experts move, equally far, and in the same direction?"""

from __future__ import annotations

import torch

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of


class TaskVectors(Diagnostic):
    """How far did the experts move, equally far, and in the same direction?

    Relative norm ||tau_k|| / ||theta_0|| over the tensors that some expert moved, dispersion
    max / min of it, cosines of the task vectors.

    Paper: Ilharco et al. 2023, arXiv:2212.04089, section 3 (cosines); the dispersion that CORAM
    calls D, low at 1.3 to 3.5 and high near 16.
    Departures: the levels are reading aids; they were not fitted to measured merges.
    """

    def measure(self, evidence: Evidence) -> Finding:
        """Return the norms' dispersion as the value, norms and cosines as predictors."""
        # tensors that no expert moved (such as BatchNorm's running variances) would drown the rest
        moved = [p for p in evidence.products.values() if bool((p.diagonal()[1:] > 0).any())]
        summed = torch.stack(moved or list(evidence.products.values())).sum(0)
        norms = summed.diagonal().clamp(min=0).sqrt()
        whole = float(norms[0]) or 1.0
        relative = [float(norm) / whole for norm in norms[1:]]
        scale = torch.where(norms[1:] == 0, 1.0, norms[1:])
        cosines = summed[1:, 1:] / scale[:, None] / scale[None, :]
        smallest, largest = min(relative), max(relative)
        dispersion = largest / smallest if smallest > 0 else float(len(relative) > 1) * 1e9
        pairs = cosines[~torch.eye(len(relative), dtype=torch.bool)]
        mean_cosine = float(pairs.mean()) if len(pairs) else 1.0
        farthest = evidence.experts[relative.index(largest)]
        nearest = evidence.experts[relative.index(smallest)]
        return Finding(
            question="How far did the experts move, and in the same direction?",
            verdict=(
                f"They moved {_percent(smallest)} to {_percent(largest)} of the base's norm"
                + (f" ({nearest} least, {farthest} most)" if len(relative) > 1 else "")
                + (
                    f", with a mean cosine of {mean_cosine:.2f} between them."
                    if len(pairs)
                    else "."
                )
            ),
            level=level_of(max(dispersion / 3.5, largest / 0.1), good=1.0, poor=3.0),
            where=farthest,
            value=dispersion,
            unit="largest / smallest norm",
            advice=(
                f"Lower the coefficient of {farthest}: it moved {dispersion:.1f} times as far as "
                f"{nearest} and will dominate a sum."
                if 3.5 < dispersion < 1e9
                else f"{nearest} did not move at all; is it the base itself?"
                if dispersion >= 1e9
                else ""
            ),
            predictors={
                "relative_norm": dict(zip(evidence.experts, relative, strict=True)),
                "norm_dispersion": dispersion,
                "cosine": cosines.tolist(),
                "mean_cosine": mean_cosine,
            },
        )


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"
