"""Examination: one thing that is known to make merges garbage, looked for in a patient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mergewell.component import Component, Family
from mergewell.doctor.patient import Patient

Severity = Literal["garbage", "damage", "doubt"]
"""Whether the merge is good for nothing by it, loses by it, or deserves a second look."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong."""

    severity: Severity
    sentence: str
    """What is wrong, where, and what to do about it: one sentence."""

    where: str
    """The model that it is wrong with."""

    tensors: tuple[str, ...] = ()
    """The first tensors that show it."""

    examination: str = ""
    """What found it."""

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


class Examination(Component):
    """Looks for one thing; the docstring's first line says for what."""

    @abstractmethod
    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield what is wrong, if anything."""

    def objection(self, patient: Patient) -> str:
        """Return why it cannot be looked for here, as the end of a sentence; empty where it can."""
        del patient
        return ""


EXAMINATIONS: Family[Examination] = Family(
    "mergewell.doctor.examinations", Examination, "examination"
)
"""All examinations, by name."""


def named(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
