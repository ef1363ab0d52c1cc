"""Answers of the result to a few inputs: none, all the same, or as good as guessed."""

from __future__ import annotations

from collections.abc import Iterator

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient

KEPT = 0.25
"""Share of the least certain expert's certainty (1 - entropy / log C) that the result keeps."""

SURE = 0.1
"""Certainty below which an expert says too little for a comparison."""

COLLAPSED = 0.95
"""Share of the inputs that one answer may get where every expert's gets at most 0.7."""

_VARIED = 0.7


class Answers(Examination):
    """Results whose answers are no numbers, all one and the same, or near uniform."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield the result, if its answers are unlike those of every expert."""
        if patient.probe is None:
            return
        *experts, result = patient.probe.answers
        inputs = f"{patient.probe.inputs} {'of your' if patient.probe.own else 'random'} inputs"
        if not result.finite:
            yield Trouble(
                "garbage",
                f"{result.name}: it answers {inputs} with NaN or infinity; merge with smaller "
                "coefficients, or store it in float32.",
                result.name,
            )
            return
        sound = [one for one in experts if one.finite]
        certain = min((1 - one.entropy for one in sound), default=0.0)
        if certain >= SURE and 1 - result.entropy < KEPT * certain:
            yield Trouble(
                "garbage",
                f"{result.name}: its answers to {inputs} are near uniform, of {result.entropy:.0%} "
                "of the largest entropy where its experts have at most "
                f"{max(one.entropy for one in sound):.0%}; ask `mergewell check` whether "
                "these experts merge at all, or try ties or smaller coefficients.",
                result.name,
            )
        most = max((one.commonest for one in sound), default=1.0)
        if result.commonest >= COLLAPSED and most <= _VARIED:
            yield Trouble(
                "garbage",
                f"{result.name}: it gives one and the same answer to {result.commonest:.0%} of "
                f"{inputs}, its experts to at most {most:.0%}; merge with smaller coefficients.",
                result.name,
            )

    def objection(self, patient: Patient) -> str:
        """Return why the models were not run."""
        if patient.merged is None:
            return "there is no result yet"
        return "" if patient.probe is not None else "the models were not run"
