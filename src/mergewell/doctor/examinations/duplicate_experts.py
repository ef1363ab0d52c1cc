"""Experts that are one and the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient


class DuplicateExperts(Examination):
    """Two experts with the same weights, which count twice."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each pair whose weights do not differ."""
        products = patient.total(patient.trained)
        if not products.numel():
            return
        for one, other in combinations(range(1, len(patient.experts) + 1), 2):
            far = products[one, one] + products[other, other] - 2 * products[one, other]
            if far <= 1e-12 * (products[one, one] + products[other, other]) and (
                products[one, one] > 0 or patient.base is None
            ):
                first, second = patient.weighed[one].name, patient.weighed[other].name
                yield Trouble(
                    "damage",
                    f"{second}: its weights are those of {first}, so that one expert counts twice; "
                    "drop one of them, or name the model that was meant.",
                    second,
                )
