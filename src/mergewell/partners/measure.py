"""What groups of experts keep when they are averaged, measured on unlabelled inputs.

Shapes: K experts, N inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mergewell.descent.tasks import LearningTask, said
from mergewell.diagnostics.ops import measure_task_vectors
from mergewell.errors import DataError, PlanError
from mergewell.models.dataflow import evaluating
from mergewell.models.loader import load_state
from mergewell.plan import Plan, make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors

MIDDLE = 4
"""Groups of the middle size that are measured."""

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Kept:
    """Share of the own experts' answers that a group's average gives, and its standard error."""

    members: tuple[int, ...]
    share: float
    error: float


def covariance(plan: Plan) -> NDArray[np.float64]:
    """Return the covariance of the experts' task vectors over the whole model, [K, K].

    Raises:
        PlanError: no base, fewer than two experts, or one that did not move.
    """
    if plan.base is None or len(plan.experts) < 2:
        raise PlanError("Partners are compared by their task vectors; name a base and two experts.")
    sums = measure_task_vectors(plan)
    products = torch.stack([one.products[1:, 1:] for one in sums.values()]).sum(0).double()
    totals = torch.stack([one.sums for one in sums.values()]).sum(0).double()
    size = sum(plan.tasks[name].spec.numel for name in sums)
    for place, length in enumerate(products.diagonal()):
        if length == 0:
            raise PlanError(
                f"{plan.recipe.experts[place].path} does not differ from the base; leave it out."
            )
    return ((products - totals[:, None] * totals / size) / size).numpy()


def correlation(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return model kinship, the Pearson correlation of every two task vectors, [K, K]."""
    deviations = np.sqrt(covariance.diagonal())
    return covariance / np.outer(deviations, deviations)


def groups_to_measure(count: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Return all pairs, some groups of the middle size and all experts, by their places."""
    found = list(combinations(range(count), 2))
    middle = round(math.sqrt(2 * count))
    if 2 < middle < count:
        generator = np.random.default_rng(seed)
        drawn = {
            tuple(sorted(map(int, generator.permutation(count)[:middle]))) for _ in range(MIDDLE)
        }
        found += sorted(drawn)
    return found if count == 2 else [*found, tuple(range(count))]


def measure(
    recipe: Recipe,
    groups: Sequence[tuple[int, ...]],
    tasks: Sequence[LearningTask],
    factory: Callable[[], nn.Module],
    *,
    on_step: OnStep | None = None,
) -> list[Kept]:
    """Return what the average of each group keeps of its experts' answers on their own tasks.

    Raises:
        DataError: an expert without inputs of its own.
        UserError: as `make_plan`, `merge_tensors` and `load_state`.
    """
    plan = make_plan(recipe)
    if {task.expert for task in tasks} != set(range(len(plan.experts))):
        raise DataError("Groups are judged on inputs of each expert's task; add --data once each.")
    module, found = factory(), list[Kept]()
    with torch.no_grad():
        aims = said("expert", tasks, plan, factory)
        for group in groups:
            data: dict[str, Any] = {
                **recipe.as_data(),
                "method": {"name": "average"},
                "dtype": "float32",
            }
            data["experts"] = [data["experts"][place] for place in group]
            tensors = dict(merge_tensors(make_plan(make_recipe(data))))
            load_state(module, tensors)
            shares: list[float] = []
            variances: list[float] = []
            with evaluating([module]):
                for task, aim in zip(tasks, aims, strict=True):
                    if task.expert not in group:
                        continue
                    same = torch.cat(
                        [
                            task.logits(module, batch).argmax(-1) == wanted.argmax(-1)
                            for batch, wanted in zip(task.batches, aim, strict=True)
                        ]
                    )
                    share = float(same.double().mean())
                    shares.append(share)
                    variances.append(share * (1 - share) / len(same))
            error = math.sqrt(sum(variances)) / len(shares)
            found.append(Kept(group, sum(shares) / len(shares), error))
            if on_step is not None:
                on_step("groups", len(found), len(groups))
    return found


def pairs_of(kept: Sequence[Kept], count: int) -> NDArray[np.float64]:
    """Return the shares of the pairs among what was measured, [K, K]."""
    found = np.full((count, count), np.nan)
    for each in kept:
        if len(each.members) == 2:
            i, j = each.members
            found[i, j] = found[j, i] = each.share
    return found


def points_of(kept: Sequence[Kept]) -> list[tuple[int, float, float]]:
    """Return by number of experts the mean share and its standard error.

    The error holds that of the inputs, which groups share, and the spread of the groups.
    """
    found: list[tuple[int, float, float]] = []
    for size in sorted({len(each.members) for each in kept}):
        shares = np.array([each.share for each in kept if len(each.members) == size])
        inputs = max(each.error for each in kept if len(each.members) == size)
        spread = float(shares.std(ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
        found.append((size, float(shares.mean()), math.hypot(inputs, spread)))
    return found
