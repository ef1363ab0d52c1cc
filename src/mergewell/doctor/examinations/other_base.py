"""Experts, or a result, that lie as far from the base as models that have nothing in common."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient

ALIKE = 0.5
"""Cosine of the matrices of a model and its base from which on they are kin: fine-tuned ones have
0.9 and more, unrelated ones about 0."""


class OtherBase(Examination):
    """Experts that did not come from this base."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each model whose matrices point elsewhere."""
        products = patient.total(patient.matrices)
        if not products.numel():
            return
        first = patient.weighed[0]
        for index, model in enumerate(patient.weighed[1:], 1):
            inner = float(products[0, 0] + products[0, index])
            square = float(products[0, 0] + 2 * products[0, index] + products[index, index])
            if model is first or float(products[0, 0]) <= 0 or square <= 0:
                continue
            cosine = inner / sqrt(float(products[0, 0]) * square)
            if cosine >= ALIKE:
                continue
            what = (
                "the merge destroyed what the base knew; merge with smaller coefficients"
                if model is patient.merged
                else "it came from another base; name the base it was fine-tuned from, or "
                "`mergewell align` it first"
            )
            yield Trouble(
                "garbage",
                f"{model.name}: its matrices have the cosine {cosine:.2f} with those of "
                f"{first.name}, where fine-tuned models have 0.9 and more, so {what}.",
                model.name,
            )

    def objection(self, patient: Patient) -> str:
        """Return what is missing to compare with."""
        return "" if patient.matrices else "no two models have a matrix in common"
