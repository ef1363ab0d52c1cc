"""Checkpoints and data looked at: what the bound is made from, and earlier checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergewell.advise.bound import Evidence
from mergewell.advise.early import EarlyChoice, choose
from mergewell.advise.measure import OnStep, informed, measure
from mergewell.advise.settings import Known
from mergewell.blocks import explain_not_finite
from mergewell.descent.tasks import LearningTask
from mergewell.diagnostics.ops import measure_task_vectors
from mergewell.flags import recipe_from_flags
from mergewell.plan import Plan, make_plan
from mergewell.run import merge_tensors


@dataclass(frozen=True, slots=True)
class Inputs:
    """Data of the experts' tasks, and what takes them."""

    tasks: Sequence[LearningTask]
    factory: Callable[[], nn.Module]


def examine(
    plan: Plan,
    names: Sequence[str],
    known: Sequence[Known],
    *,
    inputs: Inputs | None = None,
    on_step: OnStep | None = None,
) -> tuple[Evidence, tuple[EarlyChoice, ...]]:
    """Return what weights and inputs say of a plan's experts, and of their earlier checkpoints.

    The plan averages the experts and has a base; `names` and `known` have one entry an expert.

    Raises:
        UserError: earlier checkpoints, weights or data that do not fit.
    """
    count = len(names)
    runs = [one.checkpoints or {} for one in known]
    earlier = [path for run in runs for path in run.values()]
    whole = _with(plan, earlier) if earlier else plan
    products = products_of(whole, on_step)
    at = iter(range(count, count + len(earlier)))
    places = [{step: next(at) for step in run} for run in runs]
    evidence = Evidence(names, known, products[: count + 1, : count + 1])
    measured = None
    if inputs is not None:
        measured = measure(
            inputs.tasks,
            whole.experts[:count],
            plan.reference,
            {**plan.reference, **dict(merge_tensors(plan))},
            [{step: whole.experts[place] for step, place in run.items()} for run in places],
            inputs.factory,
            on_step=on_step,
        )
    evidence = informed(evidence, measured)
    bent = evidence.curvatures
    choices = choose(
        names,
        products[1:, 1:],
        places,
        curvatures=None if bent is None else [one.value for one in bent],
        losses=None if measured is None else measured.own,
        early=None if measured is None else measured.early,
    )
    return evidence, choices


def products_of(plan: Plan, on_step: OnStep | None = None) -> Tensor:
    """Return inner products of the base and the task vectors, [N + 1, N + 1], float64.

    They are summed over the tensors that some expert moved.

    Raises:
        UserError: weights that are not finite; names the tensor.
    """
    total = sum(t.spec.nbytes for t in plan.tasks.values() if t.copied_from is None)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_step is not None:
            on_step("weights", done, total)

    found = {n: s.products for n, s in measure_task_vectors(plan, on_progress=progress).items()}
    for name, products in found.items():
        if not bool(products.isfinite().all()):
            explain_not_finite(plan, name)
    moved = [each for each in found.values() if bool((each.diagonal()[1:] > 0).any())]
    return torch.stack(moved or list(found.values())).sum(0)


def _with(plan: Plan, earlier: Sequence[str]) -> Plan:
    """Return a plan that also holds earlier checkpoints, behind the experts."""
    paths = [*(each.path for each in plan.recipe.experts), *earlier]
    return make_plan(
        recipe_from_flags(base=plan.recipe.base, experts=paths, method="average", settings=[])
    )
