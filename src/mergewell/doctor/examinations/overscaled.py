"""Coefficients that push a merge beyond what any expert moved."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient

PLAIN, ANY = 2.0, 3.0
"""How many times the longest task vector a merge may be away from its base: where task vectors are
added, and under methods that look at what they add."""

_ADDING = ("task_arithmetic", "dare")


class Overscaled(Examination):
    """Merges, made or planned, that lie much further from the base than any expert."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield the merge, if its task vector is too long for its experts'."""
        products = patient.total(patient.trained)
        count = len(patient.experts)
        if patient.base is None or not count or not products.numel():
            return
        longest = float(products.diagonal()[1 : count + 1].max())
        recipe = patient.recipe
        name = recipe.method.name if recipe is not None else ""
        if longest <= 0:
            return
        if patient.merged is not None:
            ratio, where = sqrt(float(products[-1, -1]) / longest), patient.merged.name
            says = "lies"
        elif recipe is not None and name in _ADDING:
            given = products.new_tensor([e.coefficient for e in recipe.experts])
            scale = float((recipe.method.model_extra or {}).get("scale", 1.0))
            inner = products[1 : count + 1, 1 : count + 1]
            ratio, where = abs(scale) * sqrt(float(given @ inner @ given) / longest), name
            says = "would lie"
        else:
            return
        limit = PLAIN if name in _ADDING else ANY
        if ratio > limit:
            yield Trouble(
                "garbage" if ratio > 2 * limit else "damage",
                f"{where}: the merge {says} {ratio:.1f} times as far from {patient.base.name} as "
                f"its furthest expert; divide the coefficients by {ratio:.1f} or more.",
                where,
            )

    def objection(self, patient: Patient) -> str:
        """Return what is missing."""
        return "" if patient.base is not None and patient.experts else "there is no base to be near"
