"""Coefficients that push a merge beyond what any expert moved."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import ADDING, Patient, shares_of
from mergewell.recipe import Recipe

PLAIN, ANY = 2.0, 3.0
"""How many times the longest task vector a merge may be away from its base: where task vectors are
added, and under methods that look at what they add."""


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
        elif recipe is not None and name in ADDING:
            shares = products.new_tensor(shares_of(recipe))
            inner = products[1 : count + 1, 1 : count + 1]
            ratio, where = sqrt(float(shares @ inner @ shares) / longest), name
            says = "would lie"
        else:
            return
        limit = (PLAIN if name in ADDING else ANY) * (_noise(recipe) if recipe is not None else 1)
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


def _noise(recipe: Recipe) -> float:
    """Return by how much dropping at random and rescaling, as DARE does, lengthens a task vector.

    A fraction d that is kept and scaled by 1 / d has the length of the whole times d ** -1/2.
    """
    method = recipe.method.build()
    density: object = getattr(method, "density", 1.0)
    if getattr(method, "rescale", None) not in ("density", "probability"):
        return 1.0
    kept = min(density) if isinstance(density, tuple) else density  # pyright: ignore
    return float(kept) ** -0.5 if isinstance(kept, float) else 1.0
