"""Adjustment: what is learned of the experts themselves, beside their coefficients.

An adjustment changes a tensor's experts before the method merges them, by a leaf that gradients
reach through `method.merge`. What it ends with is written as task vectors, so that the result is
again a recipe: of adjusted experts, for any method.

Shapes: K experts.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mergewell.errors import RecipeError
from mergewell.plan import Plan
from mergewell.recipe import Recipe
from mergewell.storage.durable import write_durably, writing
from mergewell.storage.header import build_header
from mergewell.storage.spec import TensorSpec, is_mergeable
from mergewell.storage.views import FORMAT
from mergewell.tensor_group import TensorGroup


class Adjustment(ABC):
    """A way to change a tensor's experts, with a learned leaf a tensor."""

    @abstractmethod
    def start(self, group: TensorGroup) -> Tensor | None:
        """Return the leaf to begin with, or None for a tensor whose experts stay as they are."""

    @abstractmethod
    def adjusted(self, group: TensorGroup, leaf: Tensor) -> TensorGroup:
        """Return the group with its experts changed, differentiable by the leaf."""

    def advance(self) -> None:
        """Draw anew, where there is something random; called before the merge is placed."""
        return

    def settle(self) -> None:
        """Draw no more: from here on the adjustment is what its leaves say."""
        return


def with_task_vectors(group: TensorGroup, task_vectors: Iterable[Tensor]) -> TensorGroup:
    """Return the group with experts that are its base plus these task vectors."""
    base = group.required_base
    return replace(group, experts=tuple(base + tau for tau in task_vectors))


def require_writable(recipe: Recipe, folder: str, learner: str) -> None:
    """Require what `write_expert` will need, before anything is learned.

    Raises:
        RecipeError: no folder, no base, or models that are stacks of layers.
        OutputError: the folder cannot be made.
    """
    if recipe.base is None:
        raise RecipeError(f"{learner} adjusts task vectors; name the base.")
    if recipe.base_layers or any(expert.layers for expert in recipe.experts):
        raise RecipeError(
            f"{learner} cannot adjust experts that are stacked from layers; merge the stack first."
        )
    require_folder(folder, learner)


def require_folder(folder: str, learner: str) -> None:
    """Require a folder for what a learner writes beside its recipe, and make it.

    Raises:
        RecipeError: none is named.
        OutputError: it cannot be made.
    """
    if not folder:
        raise RecipeError(
            f"{learner} writes tensors that its recipe cannot hold; name a folder for them with "
            "--set folder=DIR."
        )
    with writing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)


def written_name(learner: str, leaves: Iterable[Tensor]) -> str:
    """Return a file name's beginning that tells what was learned: the same for the same leaves."""
    hasher = hashlib.blake2b(digest_size=6)
    for leaf in leaves:
        hasher.update(leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{learner}-{hasher.hexdigest()}"


def write_expert(
    plan: Plan, expert: int, adjusted: Mapping[str, Tensor], folder: str, name: str
) -> Path:
    """Write an adjusted expert as a task vector in float32, and return its path.

    Tensors that are not among `adjusted` (task vectors by name) keep the expert's own. One expert
    is held. A file of this name is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    source = plan.experts[expert]
    stem = Path(plan.recipe.experts[expert].path).name.partition(".")[0]
    path = Path(folder) / f"{name}.{expert + 1}.{stem}.safetensors"
    parts: dict[str, Tensor] = {}
    for key in sorted(plan.tasks):
        spec = plan.reference.spec(key)
        if key not in source or not is_mergeable(spec.dtype):
            continue
        tau = adjusted.get(key)
        if tau is None:
            tau = source[key].float() - plan.reference[key].float()
        if bool(tau.any()):
            parts[f"{key}.d"] = tau.detach().to(torch.float32).reshape(spec.shape).contiguous()
    specs = [TensorSpec(key, part.dtype, tuple(part.shape)) for key, part in parts.items()]
    header, _ = build_header(specs, {"format": FORMAT, "adjusted": str(source.path)})
    body = (bytes(part.reshape(-1).view(torch.uint8).numpy()) for part in parts.values())
    write_durably(path, header + b"".join(body))
    return path


def of_adjusted(recipe: Recipe, paths: Iterable[Path]) -> Recipe:
    """Return the recipe with these experts in the places of its own."""
    experts = [
        expert.model_copy(update={"path": str(path)})
        for expert, path in zip(recipe.experts, paths, strict=True)
    ]
    return recipe.model_copy(update={"experts": (*experts,)})
