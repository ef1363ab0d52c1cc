"""The models of a calibration: built without weights, named, and known again by their digests.

Shapes: K experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergewell.calibration.data import Data, expert_name
from mergewell.calibration.result import Calibration, Model
from mergewell.errors import DataError
from mergewell.guidance import model_digest
from mergewell.models.skeleton import Read, Skeleton, without_weights
from mergewell.plan import Plan
from mergewell.run import merge_tensors
from mergewell.storage.base import Checkpoint

BASE, MERGED, MEAN = "base", "merged", "mean"
"""Names of the models that are no experts."""


def expert_names(plan: Plan) -> list[str]:
    """Return what the experts are called: `expert 1`, `expert 2`, ..."""
    return [expert_name(number) for number in range(len(plan.experts))]


def skeletons(plan: Plan, base: Checkpoint, data: Data) -> dict[str, Skeleton]:
    """Return the base, the experts, the merged model and, for mode `mean`, the plain average.

    Raises:
        ModelError: a checkpoint does not fit the module.
    """
    prototype = without_weights(data.factory)
    made = {BASE: Skeleton(prototype, base.specs, _reading(base))}
    for name, expert in zip(expert_names(plan), plan.experts, strict=True):
        made[name] = Skeleton(prototype, expert.specs, _reading(expert))
    specs = {task.name: task.spec for task in plan.tasks.values()}
    made[MERGED] = Skeleton(prototype, specs, lambda names: merge_tensors(plan, names))
    if data.mode == "mean":
        made[MEAN] = Skeleton(prototype, base.specs, _averaging(plan.experts))
    return made


def described(plan: Plan, base: Checkpoint) -> tuple[Model, ...]:
    """Return what a calibration's head says of the models."""
    models = [
        Model(name, str(checkpoint.path), model_digest(checkpoint))
        for name, checkpoint in zip([BASE, *expert_names(plan)], [base, *plan.experts], strict=True)
    ]
    return (*models, Model(MERGED, "", merge_digest(plan)))


def require_same(plan: Plan, calibration: Calibration) -> None:
    """Require that a calibration is of the models and the merge of a plan.

    Raises:
        DataError: it is of others.
    """
    base = plan.base if plan.base is not None else plan.reference
    found = [model_digest(checkpoint) for checkpoint in (base, *plan.experts)]
    known = [model.digest for model in calibration.head.models]
    paths = [str(checkpoint.path) for checkpoint in (base, *plan.experts)]
    if len(known) != len(found) + 1:
        raise DataError(
            f"The calibration is of {len(known) - 2} experts and {len(plan.experts)} are named; "
            "name those that it was made with."
        )
    for path, model, own in zip(paths, calibration.head.models, found, strict=False):
        if model.digest != own:
            raise DataError(
                f"{path} is not the {model.name} that the calibration was made with "
                f"({model.path}); name that one or calibrate again."
            )
    if known[-1] != merge_digest(plan):
        raise DataError(
            "The calibration was made with another method, other settings or coefficients than "
            "are named; name the same or calibrate again."
        )


def merge_digest(plan: Plan) -> str:
    """Return a hash of what a plan does, whatever its models are and wherever files lie."""
    left_out = {"base", "notes", "shard_bytes", "repair"}
    recipe = plan.recipe.model_dump(mode="json", exclude=left_out)
    recipe["calibration"] = None if plan.guidance is None else plan.guidance.digest
    recipe["method"] = {"name": plan.recipe.method.name}
    recipe["method"] |= plan.recipe.method.build().parameters()
    for expert in recipe["experts"]:
        del expert["path"]
    text = json.dumps(recipe, sort_keys=True)
    return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def simplex(coefficients: Sequence[float]) -> list[float]:
    """Return the coefficients divided by their sum; equal ones where they cannot be."""
    if min(coefficients) < 0 or sum(coefficients) <= 0:
        return [1 / len(coefficients)] * len(coefficients)
    return [coefficient / sum(coefficients) for coefficient in coefficients]


def _reading(checkpoint: Checkpoint) -> Read:
    def read(names: tuple[str, ...]) -> Iterable[tuple[str, Tensor]]:
        return ((name, checkpoint[name]) for name in names)

    return read


def _averaging(experts: Sequence[Checkpoint]) -> Read:
    def read(names: tuple[str, ...]) -> Iterable[tuple[str, Tensor]]:
        for name in names:
            first = experts[0][name]
            if not first.is_floating_point():
                yield name, first
                continue
            total = first.to(torch.float64)
            for expert in experts[1:]:
                total = total + expert[name].to(torch.float64)
            yield name, total / len(experts)

    return read
