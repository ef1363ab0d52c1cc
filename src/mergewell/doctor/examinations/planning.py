"""Whatever planning refuses: other architectures, missing tensors, other shapes."""

from __future__ import annotations

from collections.abc import Iterator

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient


class Planning(Examination):
    """Models that do not fit one another: architectures, tensors, shapes."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield why no plan can be made."""
        # the tokens that differ are named by the examination of vocabularies
        if patient.refusal and "of its tokens are not those of" not in patient.refusal:
            yield Trouble("garbage", patient.refusal, "the recipe")
