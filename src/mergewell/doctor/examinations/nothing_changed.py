"""Experts that are the base, or a result that is one of its inputs, weight for weight."""

from __future__ import annotations

from collections.abc import Iterator

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient


class NothingChanged(Examination):
    """Experts that are the base itself, and merges that changed nothing."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each model that does not differ from the base."""
        products = patient.total(patient.trained)
        if not products.numel():
            return
        for index, model in enumerate(patient.weighed[1:], 1):
            still = float(products[index, index]) == 0.0
            if model is patient.merged and still and not self._all_still(patient):
                first = patient.weighed[0].name
                yield Trouble(
                    "damage",
                    f"{model.name}: no weight differs from {first}, so nothing was merged; look at "
                    "the recipe's coefficients and rules with `mergewell plan`.",
                    model.name,
                )
            elif still and patient.base is not None and model is not patient.merged:
                yield Trouble(
                    "damage",
                    f"{model.name}: no weight differs from {patient.base.name}, so it brings "
                    "nothing but thins out the others; name the fine-tuned model, or drop it.",
                    model.name,
                )

    def objection(self, patient: Patient) -> str:
        """Return what is missing to compare with."""
        return "" if patient.trained else "no two models have a tensor in common"

    def _all_still(self, patient: Patient) -> bool:
        """Return whether all experts are the reference, so that the result must be."""
        products = patient.total(patient.trained)
        last = len(patient.experts) + 1
        return float(products.diagonal()[1:last].sum()) == 0.0
