"""Numbers that are none: NaN and infinity in weights."""

from __future__ import annotations

from collections.abc import Iterator

from mergewell.doctor.examinations.base import Examination, Trouble, named
from mergewell.doctor.patient import Patient


class NotFinite(Examination):
    """Weights that are NaN or infinite, which any merge spreads."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each model with such weights."""
        seen: set[str] = set()
        for index, model in enumerate(patient.weighed):
            bad = {n: int(s.not_finite[index]) for n, s in patient.sums.items()}
            bad = {name: count for name, count in bad.items() if count}
            if not bad or model.name in seen:
                continue
            seen.add(model.name)
            remedy = "merge again from sound inputs"
            yield Trouble(
                "garbage",
                f"{model.name}: {sum(bad.values())} weights are NaN or infinite, in "
                f"{named([*bad])}; "
                f"{remedy if model is patient.merged else 'get this model anew or leave it out'}.",
                model.name,
                tuple(bad)[:3],
            )
