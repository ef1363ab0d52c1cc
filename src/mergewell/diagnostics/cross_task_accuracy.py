"""How well does each expert do on the other experts' tasks?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean, pair_values, rows_of


class CrossTaskAccuracy(Diagnostic):
    """How well does each expert do on the other experts' tasks?

    The mean over pairs of the accuracy of expert i on the task of expert j, over that of expert j
    itself; and what it is above the base's accuracy there, where that was measured.

    Paper: "SyMerge", which reports r = 0.86 with merged accuracy over 20 tasks of one CLIP model.
    Departures: the experts' outputs as they are, with the tasks' own heads, where the paper fits a
    head anew; the quotient, so that hard tasks do not look like bad merges. One study's correlation
    is no validation: it does not decide the verdict, and the levels are reading aids.
    """

    decides: ClassVar[bool] = False
    asks: ClassVar[str] = (
        "Asks for every expert's accuracy on every task; `mergewell.evaluate` judges answers by "
        "labels."
    )

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the mean retention on others' tasks as the value."""
        accuracy = evidence.accuracy
        if accuracy is None or self.objection(evidence):
            return None
        retention = _retention(accuracy)
        names = evidence.experts
        off = ~torch.eye(len(names), dtype=torch.bool)
        known = off & retention.isfinite()
        value = float(retention[known].mean())
        flat = torch.where(known, retention, float("inf"))
        harmful, harmed = divmod(int(flat.argmin()), len(names))
        lowest = float(flat[harmful, harmed])
        predictors: dict[str, object] = {
            "cross_task_accuracy": mean(pair_values(accuracy)),
            "cross_task_retention": value,
            "cross_task": rows_of(accuracy),
        }
        if evidence.base_accuracy is not None:
            gains = (accuracy - evidence.base_accuracy)[known]
            if bool(gains.isfinite().any()):
                predictors["cross_task_gain"] = float(gains.nanmean())
        return Finding(
            question="How well does each expert do on the other experts' tasks?",
            verdict=(
                f"On one another's tasks the experts keep {100 * value:.0f} % of the accuracy of "
                f"the task's own; least {names[harmful]} on {names[harmed]} "
                f"({100 * lowest:.0f} %)."
            ),
            level=level_of(1 - value, good=0.25, poor=0.6),
            where=names[harmful],
            value=value,
            unit="fraction of the own expert's accuracy",
            advice=(
                f"{names[harmful]} unlearned what {names[harmed]} needs: lower its coefficient."
                if lowest < 0.5
                else ""
            ),
            predictors=predictors,
            by_place={
                name: mean([float(v) for v in column[mask]])
                for name, column, mask in zip(names, retention.T, known.T, strict=True)
                if bool(mask.any())
            },
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why no expert can be judged on another's task."""
        if evidence.accuracy is None:
            return ""
        if len(evidence.experts) < 2:
            return "Cross-task accuracy compares experts, and there is only one."
        if not pair_values(_retention(evidence.accuracy)):
            return "No expert was evaluated on a task that its own expert gets right at all."
        return ""


def _retention(accuracy: Tensor) -> Tensor:
    """Return accuracies [K, K] over those of each task's own expert; nan where that is 0."""
    own = accuracy.diagonal()
    return accuracy / torch.where(own > 0, own, float("nan"))
