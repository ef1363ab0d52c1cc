"""The identity laws on the result's own tensors: one expert alone must give itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from mergewell.doctor.examinations.base import Examination, Trouble, named
from mergewell.doctor.patient import Patient
from mergewell.errors import UserError
from mergewell.plan import Plan
from mergewell.run import merge_tensors
from mergewell.verify import elements_apart

SAMPLE = 4
"""Tensors that are merged again."""

_STEPS = 1


class Identity(Examination):
    """Results that are not what the recipe gives, and methods that do not give one expert back."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield the result or its method, if a sample of its tensors breaks a law."""
        plan, merged = patient.plan, patient.merged
        if plan is None:
            return
        names = _sample(plan)
        if merged is not None and patient.manifest is not None:
            again = merge_tensors(plan, names)
            held = merged.checkpoint
            other = [
                name
                for name, tensor in again
                if name not in held
                or held.spec(name).shape != tuple(tensor.shape)
                or held.spec(name).dtype != tensor.dtype
                or elements_apart(held[name], tensor, _STEPS)
            ]
            if other:
                yield Trouble(
                    "damage",
                    f"{merged.name}: {named(other)} is not what its recipe gives from its inputs; "
                    "`mergewell verify --deep` says more; merge again.",
                    merged.name,
                    tuple(other[:3]),
                )
        for name in names:
            yield from _law(plan, name)

    def objection(self, patient: Patient) -> str:
        """Return why nothing can be merged again."""
        if patient.plan is None:
            return "there is no recipe that can be planned"
        if not _sample(patient.plan):
            return "the recipe merges no tensor"
        if patient.plan.recipe.repair is not None:
            return "the result was repaired after the merge"
        if patient.plan.guidance is not None:
            return "its calibration is of the experts together"
        return ""


def _sample(plan: Plan) -> set[str]:
    made = sorted(name for name, task in plan.tasks.items() if task.copied_from is None)
    return set(random.Random(0).sample(made, min(SAMPLE, len(made))))


def _law(plan: Plan, name: str) -> Iterator[Trouble]:
    """Yield the method, if one expert in place of all, at coefficient 1, does not give itself."""
    task = plan.tasks[name]
    laws, word = task.method.laws, task.method.component_name()
    alone = task.method.needs.experts is None
    if laws.single_expert if alone else laws.equal_experts:
        return  # it promises no such thing, and says why
    expert = plan.experts[0]
    method = task.method.model_copy(update=dict(laws.neutral))
    count = 1 if alone else len(plan.experts)
    same = replace(task, method=method, coefficients=(1.0,) * count)
    try:
        single = replace(plan, experts=(expert,) * count, tasks={name: same})
        made = dict(merge_tensors(single))[name]
    except UserError:
        return  # of parameters that are given one an expert, there is no such merge
    due = expert[name].to(made.dtype)
    if due.isfinite().all() and elements_apart(made, due, _STEPS):
        yield Trouble(
            "damage",
            f"{word}: of one expert alone, at coefficient 1, it makes something else in {name}; "
            "this method is broken: use another, and report it.",
            word,
            (name,),
        )
