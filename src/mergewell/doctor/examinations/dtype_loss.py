"""Task vectors that are finer than what the stored dtype can tell apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient

HIGHEST = 0.25
"""Share of a plain merge's squared length that rounding may eat."""


class DtypeLoss(Examination):
    """Merges whose stored dtype rounds away what the experts learned."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield the merge, if rounding is a large part of what it changes."""
        if not patient.trained or not patient.experts:
            return
        both = torch.stack([each.lost for each in patient.trained.values()]).sum(0)
        lost, whole = float(both[0]), float(both[1])
        if whole <= 0 or lost <= HIGHEST * whole:
            return
        worst = sorted(patient.trained, key=lambda n: -float(patient.trained[n].lost[0]))
        stored = patient.weighed[0].checkpoint.spec(worst[0]).dtype
        if patient.merged is not None:
            stored = patient.merged.checkpoint.spec(worst[0]).dtype
        elif patient.plan is not None and worst[0] in patient.plan.tasks:
            stored = patient.plan.tasks[worst[0]].spec.dtype
        kind = str(stored).removeprefix("torch.")
        where = patient.merged.name if patient.merged is not None else "the merge"
        yield Trouble(
            "damage",
            f"{where}: rounding to {kind} changes the weights by {min(1.0, lost / whole):.0%} of "
            f"the square of what merging changes (most in {worst[0]}), so much of it is lost; add "
            "`dtype: float32` (--dtype float32) and merge from float32 experts if there are any.",
            where,
            tuple(worst[:3]),
        )
