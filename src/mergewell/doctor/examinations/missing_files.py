"""Files beside the weights that a model needs to be used."""

from __future__ import annotations

from collections.abc import Iterator

from mergewell.doctor.examinations.base import Examination, Trouble, named
from mergewell.doctor.patient import Model, Patient


class MissingFiles(Examination):
    """Folders without the tokenizer or configuration that the others have."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield a result, or a reference before the merge, that lacks what the others have."""
        first = patient.merged or patient.reference
        if first is None or not first.checkpoint.path.is_dir():
            return
        others = patient.models if patient.merged is not None else patient.experts
        if first.vocabulary is None and (known := [m.name for m in others if m.vocabulary]):
            yield Trouble(
                "damage",
                f"{first.name}: it has no tokenizer files, but {named(known)} has; copy them beside"
                " its weights, or the result cannot be given a text.",
                first.name,
            )
        if first.checkpoint.config is None and (known := [m.name for m in others if _has(m)]):
            yield Trouble(
                "damage",
                f"{first.name}: it has no config.json, but {named(known)} has; copy it beside its "
                "weights, or the result cannot be loaded.",
                first.name,
            )


def _has(model: Model) -> bool:
    return model.checkpoint.config is not None
