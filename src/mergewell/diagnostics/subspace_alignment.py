"""Does the merged change point where each expert's change points?"""

from __future__ import annotations

from typing import ClassVar

import torch

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean, percent, rows_of
from mergewell.statistics.subspaces import RESIDUAL


class SubspaceAlignment(Diagnostic):
    """Does the merged change point where each expert's change points?

    Of an expert's task matrix D and the sum D_M of all of them, each times its coefficient:
    ||U U' D|| / ||D||, U the leading left singular vectors of D_M, as many as miss 5 % of its norm
    (0.25 % of its energy) at most. Mean over matrices for each expert; also of expert in expert.
    k directions of O span sqrt(k / O) of a matrix that has nothing to do with them.

    Paper: Marczak et al. 2025, "No Task Left Behind", arXiv:2502.04959, section 3.
    Departures: kernels count as matrices; fused projections and transposed layers (GPT-2's Conv1D,
    whose left side is the input) are taken as stored. A matrix of more than 1024 on both sides is
    decomposed by its 256 leading directions: where these miss more than 5 %, the number is a lower
    bound. The levels are reading aids beside the paper's 0.75 to 0.87 and do not decide.
    """

    decides: ClassVar[bool] = False
    asks: ClassVar[str] = "Asks for decomposed matrices (`--deep`)."

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the mean over experts and matrices as the value."""
        if not evidence.subspaces or self.objection(evidence):
            return None
        held = evidence.subspaces
        each = torch.stack([matrix.alignment for matrix in held.values()]).nanmean(0)
        pairs = torch.stack([matrix.pairs for matrix in held.values()]).nanmean(0)
        by_place = {n: float(m.alignment.nanmean()) for n, m in held.items()}
        value = float(each.nanmean())
        shares = {e: float(s) for e, s in zip(evidence.experts, each, strict=True) if s == s}
        least, worst = min(shares, key=shares.__getitem__), min(by_place, key=by_place.__getitem__)
        chance = mean([(m.rank / m.shape[0]) ** 0.5 for m in held.values()])
        bounds = sum(m.missed > RESIDUAL + 1e-6 for m in held.values())
        return Finding(
            question="Does the merged change point where each expert's change points?",
            verdict=(
                f"The merged change spans {percent(value)} of what the experts changed, least of "
                f"{least} ({percent(shares[least])}); of an unrelated matrix it would span "
                f"{percent(chance)}"
                + (f". Lower bounds in {bounds} of {len(held)} matrices." if bounds else ".")
            ),
            level=level_of(1 - value, good=0.15, poor=0.3),
            where=worst,
            value=value,
            unit="fraction of the task matrices' norm",
            advice=(
                f"{least} is drowned by the others: raise its coefficient, or flatten the merged "
                "spectrum (an isotropic merge)."
                if value < 0.85
                else ""
            ),
            predictors={
                "sar": value,
                "sar_expert": shares,
                "sar_pairs": rows_of(pairs),
                "sar_unrelated": chance,
            },
            by_place=by_place,
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why there is nothing to align."""
        if len(evidence.experts) < 2:
            return "Subspace alignment compares experts with their sum, and there is only one."
        return ""
