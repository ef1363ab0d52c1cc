"""Do the experts use the same singular directions for different things?"""

from __future__ import annotations

from typing import ClassVar

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean


class TaskInterference(Diagnostic):
    """Do the experts use the same singular directions for different things?

    ||(U'U - 1) S (V'V - 1)||_1 over all entries, U and V the leading singular vectors of all
    experts side by side, min(O, I) / K of each, S their singular values; divided by what it would
    be for random directions with the same values. 0 where all directions are orthogonal.

    Paper: Gargiulo et al. 2025, "Task Singular Vectors", arXiv:2412.00081, section 3.3.
    Departures: the quotient, without which matrices cannot be compared. The sum of magnitudes
    depends on the basis: K identical experts have (K - 1)^2 times the sum of S, which is *less*
    than unrelated ones have once there are many directions. No evidence ties the number to
    accuracy, so it does not decide the verdict; the levels are reading aids.
    """

    decides: ClassVar[bool] = False
    asks: ClassVar[str] = "Asks for decomposed matrices (`--deep`)."

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the mean quotient over matrices as the value."""
        if not evidence.subspaces or self.objection(evidence):
            return None
        held = {n: m.interference for n, m in evidence.subspaces.items()}
        by_place = {n: i.value / i.unrelated for n, i in held.items() if i.unrelated > 0}
        if not by_place:
            return None
        worst = max(by_place, key=by_place.__getitem__)
        value = mean(list(by_place.values()))
        return Finding(
            question="Do the experts use the same singular directions for different things?",
            verdict=(
                f"The experts' leading directions interfere {value:.2g} times as much as unrelated "
                f"ones would, most in {worst} ({by_place[worst]:.2g} times)."
            ),
            level=level_of(value, good=1.2, poor=2.0),
            where=worst,
            value=value,
            unit="times the interference of unrelated directions",
            advice=(
                "Orthogonalise the experts' singular vectors before adding up (TSV-Merge)."
                if value >= 1.2
                else ""
            ),
            predictors={
                "sti_relative": value,
                "sti": mean([i.value for i in held.values()]),
            },
            by_place=by_place,
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why nothing can interfere."""
        if len(evidence.experts) < 2:
            return "Interference is between experts, and there is only one."
        moved = [m for m in evidence.subspaces.values() if m.interference.unrelated > 0]
        if evidence.subspaces and not moved:
            return "Interference is between experts, and no matrix was moved by two of them."
        return ""
