"""Learn a coefficient for every element, layer by layer, from what the experts' layers give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mergewell.calibration.data import Data
from mergewell.distil.elementwise import Fitted, fit, grown, names_of
from mergewell.distil.pairs import walk_pairs
from mergewell.distil.weights import of_weights, require_folder, write_weights
from mergewell.errors import DataError
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.models.dataflow import tensors
from mergewell.models.walk import Call
from mergewell.plan import make_plan
from mergewell.recipe import Recipe
from mergewell.run import merge_tensors


class ProDistill(Learner):
    """Learn a coefficient for every element, layer by layer, from what the experts' layers give.

    Of theta = base + sum_k lambda_k * tau_k each layer's lambda are fitted so that, on what the
    merged model gives it, the layer returns what expert t's returns on its own path, over inputs of
    every task t. One layer of every model is in memory, with four times its task vectors. Tensors
    under a rule with a method of its own, and all that is no layer's parameter, are the recipe's
    merge. The merged weights are written, and the recipe is of them alone.

    Paper: Xu et al. 2025, "Scalable Model Merging with Progressive Layer-wise Distillation",
    arXiv:2502.12706. Departures: layers are the network's repeated blocks and what lies between;
    a layer that does not come nearer to its targets keeps the start; padding does not count.
    """

    paper: ClassVar[str] = "arXiv:2502.12706"
    data: ClassVar[str] = "unlabelled"

    start: float = 0.3
    """Every coefficient at the beginning."""

    epochs: Annotated[int, Field(ge=0)] = 20
    """Passes over the inputs for each layer."""

    rate: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of Adam; the paper has 0.1 for images and 0.01 for texts."""

    folder: str = ""
    """Where the merged weights are written, as prodistill-HASH.safetensors; has to be given."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe of the merged weights that were learned and written.

        Raises:
            DataError: no inputs, or inputs whose expert is not known.
            RecipeError, OutputError: no base, or no folder.
            ModelError: as `walk_pairs`.
        """
        require_folder(recipe, self.folder, "prodistill")
        owners = [owner for owner in material.owners if owner is not None]
        if not owners or len(owners) != len(material.batches):
            raise DataError(
                "prodistill learns from each expert on its own task; give inputs for each expert "
                "by itself."
            )
        plan, batches = make_plan(recipe), material.batches
        data = Data(
            material.factory,
            batches,
            samples=sum(len(tensors(batch)[0]) for batch in batches),
            owners=owners,
        )
        data.owner_of(len(recipe.experts))  # refuses experts that are none
        weights = dict(merge_tensors(plan))
        fits: list[Fitted] = []

        def solve(
            place: str, module: nn.Module, calls: Mapping[int, Call], targets: Mapping[int, Tensor]
        ) -> None:
            names = names_of(plan, place, module)
            if not names:
                return
            found = fit(
                module,
                {own: grown(plan, name) for own, name in names.items()},
                calls, targets, batches, owners,
                start=self.start, epochs=self.epochs, rate=self.rate,
            )  # fmt: skip
            fits.append(found)
            parameters = dict(module.named_parameters())
            with torch.no_grad():
                for own, name in names.items():
                    weights[name] = found.weights[own].to(plan.tasks[name].spec.dtype)
                    parameters[own].copy_(weights[name])

        walk_pairs(plan, data, solve, on_step=on_step)
        path = write_weights(plan, weights, self.folder, "prodistill")
        energy = sum(each.energy for each in fits) or 1.0
        was, now = (
            math.sqrt(sum(getattr(each, side) for each in fits) / energy)
            for side in ("before", "after")
        )
        note = (
            f"prodistill: relative distance of {len(fits)} layers to the experts' {now:.4g}, with "
            f"every coefficient {self.start:g} {was:.4g}, on the inputs that taught; the merge of "
            f"{len(recipe.experts)} experts stands in {path}."
        )
        result = of_weights(recipe, path)
        result = result.model_copy(update={"notes": (*recipe.notes, note), "repair": recipe.repair})
        trials = (Trial(recipe, -was, kept=False), Trial(result, -now, kept=True))
        return Learned(result, -now, trials)
