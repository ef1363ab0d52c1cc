"""Are the merged model's features the mean of the experts' features?"""

from __future__ import annotations

from statistics import median
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean


class LinearConnectivity(Diagnostic):
    """Are the merged model's features the mean of the experts' features, block by block?

    Layer-wise linear feature connectivity: cosine, sample by sample, of the merged features and the
    experts' weighted mean, and the quotient of their norms, at each block. Beside it the cosine
    between two experts, which a merge between them reaches without any linearity. Cross-task
    linearity is the same of two experts and the model half way between, at the output.

    Paper: Zhou et al. 2023, arXiv:2307.08286 (LLFC); Zhou et al. 2024, arXiv:2402.03660 (CTL).
    Departures: pooled features; at the merged model's coefficients instead of along a line; CTL at
    the output only, where paths between experts were run. The levels are reading aids; the output
    gap says the same at the network's end, so this does not decide the verdict.
    """

    decides: ClassVar[bool] = False
    asks: ClassVar[str] = "Asks for inputs (`--data`)."

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the median cosine over blocks as the value."""
        if not evidence.features or self.objection(evidence):
            return None
        seen = {name: _connectivity(f, evidence) for name, f in evidence.features.items()}
        seen = {name: found for name, found in seen.items() if found[0] == found[0]}
        by_place = {name: found[0] for name, found in seen.items()}
        cosine = median(by_place.values())
        ratio = median(found[1] for found in seen.values())
        alike = [found[2] for found in seen.values() if found[2] == found[2]]
        crossed = [path for path in evidence.paths if path.linearity == path.linearity]
        worst = min(by_place, key=by_place.__getitem__)
        return Finding(
            question="Are the merged model's features the mean of the experts' features?",
            verdict=(
                f"In the median block the merged features have a cosine of {cosine:.3f} with the "
                f"experts' mean and {ratio:.2f} times its length"
                + (f"; two experts have one of {median(alike):.3f}" if alike else "")
                + f"; least linear is {worst} ({by_place[worst]:.3f})."
            ),
            level=level_of(max(1 - cosine, abs(1 - ratio) / 2), good=0.05, poor=0.2),
            where=worst,
            value=cosine,
            unit="cosine, median over blocks",
            advice=(
                "The merged features shrink: re-estimate BatchNorm, or rescale them."
                if ratio < 0.8
                else f"Merge {worst} with more care: lower coefficients, or fewer experts there."
                if cosine < 0.95
                else ""
            ),
            predictors={
                "llfc": cosine,
                "llfc_worst": by_place[worst],
                "llfc_norm": ratio,
                **({"llfc_experts": median(alike)} if alike else {}),
                **({"ctl": mean([p.linearity for p in crossed])} if crossed else {}),
                **({"ctl_experts": mean([p.ends for p in crossed])} if crossed else {}),
            },
            by_place=by_place,
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why no cosine is defined."""
        seen = [_connectivity(models, evidence)[0] for models in evidence.features.values()]
        if seen and not any(cosine == cosine for cosine in seen):
            return (
                "Feature connectivity compares directions, and the merged features or the experts' "
                "mean are zero."
            )
        return ""


def _connectivity(models: Tensor, evidence: Evidence) -> tuple[float, float, float]:
    """Return the merge's cosine with the experts' mean, its relative norm, the experts' cosine."""
    wide = models.to(torch.float64)
    experts, merged = wide[1:-1], wide[-1]
    shares = evidence.coefficients or (1 / len(experts),) * len(experts)
    average = (experts * experts.new_tensor(shares)[:, None, None]).sum(0)
    lengths, norms = average.square().sum(1).sqrt(), merged.square().sum(1).sqrt()
    held = (lengths > 0) & (norms > 0)
    cosines = cosine_similarity(merged[held], average[held], dim=1)
    ratios = norms[lengths > 0] / lengths[lengths > 0]
    between = [
        float(cosine_similarity(one, other, dim=1).mean())
        for i, one in enumerate(experts)
        for other in experts[:i]
    ]
    return float(cosines.mean()), float(ratios.mean()), mean(between)
