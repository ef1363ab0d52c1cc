"""How much of what the experts learned cancels when it is added up?"""

from __future__ import annotations

import torch

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import Rows, mean, pair_values, rows_of


class SignConflict(Diagnostic):
    """How much of what the experts learned cancels when it is added up?

    conflict = 1 - sum |sum_k tau_k| / sum sum_k |tau_k| over all entries of the model. K unrelated
    task vectors of equal size have 1 - 1 / sqrt(K) on average over Gaussian entries.

    Paper: Yadav et al. 2023, arXiv:2306.01708, section 3.
    Departures: the levels compare with unrelated task vectors; they were not fitted to merges.
    """

    def measure(self, evidence: Evidence) -> Finding:
        """Return the cancelled share as the value, the pairs' opposed shares as a predictor."""
        masses = torch.stack(list(evidence.conflict_mass.values())).sum(0)
        remaining, whole = float(masses[0]), float(masses[1])
        conflict = 1 - remaining / whole if whole > 0 else 0.0
        pairs = torch.stack(list(evidence.conflict_pairs.values())).sum(0)
        opposed = pairs[0] / torch.where(pairs[1] == 0, 1.0, pairs[1])
        unrelated = 1 - len(evidence.experts) ** -0.5
        shares = {
            name: float(1 - mass[0] / mass[1])
            for name, mass in evidence.conflict_mass.items()
            if mass[1] > 0.001 * whole
        }
        worst = max(shares, key=shares.__getitem__, default="")
        largest, top = _largest(evidence)
        return Finding(
            question="How much of what the experts learned cancels when it is added up?",
            verdict=(
                f"{100 * conflict:.0f} % of the task vectors' mass cancels in their sum; "
                f"{100 * unrelated:.0f} % would if they had nothing to do with one another"
                + (f", and {100 * top:.0f} % of the largest entries oppose." if largest else ".")
            ),
            level=level_of(conflict - unrelated, good=0.02, poor=0.15),
            where=worst,
            value=conflict,
            unit="fraction of the mass",
            advice=(
                "Elect signs before averaging (ties), or drop the expert that opposes most."
                if conflict > unrelated + 0.02
                else ""
            ),
            predictors={
                "sign_conflict": conflict,
                "opposed": opposed.tolist(),
                **({"opposed_top": largest, "opposed_top_mean": top} if largest else {}),
            },
        )


def _largest(evidence: Evidence) -> tuple[Rows, float]:
    """Return the pairs' fractions of opposite signs among large entries, and their mean."""
    if not evidence.top_conflicts:
        return [], 0.0
    opposed, compared = torch.stack(list(evidence.top_conflicts.values())).sum(0).double()
    shares = opposed / compared  # nan where nothing was compared
    pairs = pair_values(shares)
    return (rows_of(shares), mean(pairs)) if pairs else ([], 0.0)
