"""Does the merged model end up where the experts' ensemble does?"""

from __future__ import annotations

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of


class OutputGap(Diagnostic):
    """Does the merged model end up where the experts' ensemble does?

    The gap between the merged model's output and the mean of the experts' outputs, as a fraction
    of the latter's norm: what the gaps of single layers add up to.

    Paper: Wang et al. 2026, arXiv:2602.08564, the variant in which every model runs by itself.
    Departures: at the network's end only; the levels are reading aids, not fitted to merges.
    """

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the gap as the value; None where nothing was run."""
        gap = evidence.output_gap
        if gap is None:
            return None
        return Finding(
            question="Does the merged model end up where the experts' ensemble does?",
            verdict=(
                f"After all layers the merge is {100 * gap:.2g} % away from the experts' "
                "averaged outputs."
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
            predictors={"output_gap": gap},
        )
