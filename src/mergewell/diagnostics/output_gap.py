"""Does the merged model end up where the experts' ensemble does?"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.models.ensemble import ensemble_outputs


class OutputGap(Diagnostic):
    """Does the merged model end up where the experts' ensemble does?

    The gap between the merged model's output and the mean of the experts' outputs, as a fraction
    of the latter's norm: what the gaps of single layers add up to. Of logits also the fraction of
    samples that both answer alike, and KL(ensemble || merged) in nats.

    Paper: Wang et al. 2026, arXiv:2602.08564, the variant in which every model runs by itself.
    Departures: at the network's end only; the ensemble is that of the outputs, hence of the logits
    and not of the probabilities; the levels are reading aids, not fitted to merges.
    """

    asks: ClassVar[str] = "Asks for inputs (`--data`)."

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the gap as the value; None where nothing was run."""
        gap, ensemble = evidence.output_gap, _ensemble(evidence)
        if gap is None and evidence.outputs is not None and ensemble is not None:
            energy = float(ensemble.double().square().sum())
            distance = float((evidence.outputs[-1] - ensemble).double().square().sum())
            gap = (distance / energy) ** 0.5 if energy > 0 else 0.0
        if gap is None:
            return None
        agreement: dict[str, float] = {}
        if evidence.logits and evidence.outputs is not None and ensemble is not None:
            agreement = _agreement(ensemble, evidence.outputs[-1])
        alike = agreement.get("output_agreement")
        return Finding(
            question="Does the merged model end up where the experts' ensemble does?",
            verdict=(
                f"After all layers the merge is {100 * gap:.2g} % away from the experts' "
                "averaged outputs"
                + (f" and gives {100 * alike:.0f} % of its answers." if alike is not None else ".")
            ),
            level=level_of(gap, good=0.15, poor=0.4),
            where="output",
            value=gap,
            unit="fraction of the ensemble's norm",
            advice=(
                "Small gaps of single layers add up: try lower coefficients, fewer experts, or a "
                "method that handles conflicts, and compare by an evaluation."
                if gap >= 0.15
                else ""
            ),
            predictors={"output_gap": gap, **agreement},
        )


def _ensemble(evidence: Evidence) -> Tensor | None:
    """Return the mean of the experts' outputs, [N, C]; None where they were not kept."""
    if evidence.outputs is None:
        return None
    experts = list(evidence.outputs[1:-1].float())
    return ensemble_outputs(experts, "logits", coefficients=evidence.coefficients)


def _agreement(ensemble: Tensor, merged: Tensor) -> dict[str, float]:
    """Return how often two models' logits [N, C] agree, and their mean divergence in nats."""
    ours, theirs = merged.double().log_softmax(-1), ensemble.double().log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    same = (merged.argmax(-1) == ensemble.argmax(-1)).double().mean()
    return {"output_agreement": float(same), "output_kl": max(0.0, float(divergence))}
