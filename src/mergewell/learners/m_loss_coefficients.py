"""Choose each layer's coefficients so that it gives what the experts' layers give together."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergewell.component import Probability
from mergewell.errors import DataError, ModelError
from mergewell.guidance import parameter_name
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.learners.ops import entropy, layer_fits
from mergewell.models.loader import load_state
from mergewell.plan import Plan, make_plan
from mergewell.recipe import MethodChoice, Recipe, Rule
from mergewell.run import merge_tensors


class MLossCoefficients(Learner):
    """Choose each layer's coefficients so that it gives what the experts' layers give together.

    The recipe's merge runs over the inputs; at each layer with its activation f the experts'
    pre-activations z_k on the same input are combined as f(sum_k c_k z_k), and c, a softmax, is
    fitted to the reference by least squares. All experts are held in memory.

    Paper: Wang et al. 2026, "M-Loss", arXiv:2602.08564, names it as future work; the way is ours.
    Departures: none. On few inputs a fit may choose a single expert, so coefficients are mixed with
    equal ones until their entropy is `least_entropy` of log K. Other tensors stay as they were.
    """

    paper: ClassVar[str] = "arXiv:2602.08564"
    data: ClassVar[str] = "unlabelled"

    reference: Literal["ensemble", "routed"] = "ensemble"
    """What a layer should give: the experts' mean, or what the batch's own expert gives."""

    least_entropy: Probability = 0.5
    """Smallest entropy of a layer's coefficients, as a fraction of that of equal ones."""

    steps: Annotated[int, Field(ge=1)] = 100
    """Steps of Adam for each layer."""

    rate: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe with a rule for each layer: an average with its coefficients."""
        if not material.batches:
            raise DataError("m_loss_coefficients learns from unlabelled inputs; give some.")
        count = len(recipe.experts)
        owners = [owner for owner in material.owners if owner is not None]
        routed = self.reference == "routed"
        if routed and (len(owners) != len(material.batches) or not {*owners} <= {*range(count)}):
            raise DataError(
                "The routed reference needs to know each batch's own expert; give inputs for each "
                "expert by itself."
            )
        plan = make_plan(recipe)
        merged = material.factory()
        load_state(merged, dict(merge_tensors(plan)))
        experts = [material.factory() for _ in plan.experts]
        for module, checkpoint in zip(experts, plan.experts, strict=True):
            load_state(module, {name: checkpoint[name] for name in checkpoint})
        fits = layer_fits(merged, experts, material.batches, owners if routed else None)
        rules: list[Rule] = []
        learned: list[Tensor] = []
        before = after = energy = 0.0
        for number, fit in enumerate(fits, 1):
            shares = fit.fitted(steps=self.steps, rate=self.rate, least_entropy=self.least_entropy)
            learned.append(shares)
            before += float(fit.gap(torch.full_like(shares, 1 / count)))
            after += float(fit.gap(shares))
            energy += fit.energy
            rules += _rules(fit.unit.parameters, plan, shares)
            if on_step is not None:
                on_step("layers", number, number)
        if not learned:
            raise ModelError("No layer with an activation was found; there is nothing to fit.")
        was, now = (math.sqrt(part / energy) if energy else 0.0 for part in (before, after))
        spread = [entropy(shares) for shares in learned]
        note = (
            f"m_loss_coefficients: discrepancy to the {self.reference} reference {now:.4g}, with "
            f"equal coefficients {was:.4g}, in {len(learned)} layers on the inputs that chose; "
            f"entropy of the coefficients {min(spread):.2f} of log K at least, "
            f"{sum(spread) / len(spread):.2f} on average."
        )
        rules += recipe.rules
        result = recipe.model_copy(update={"rules": (*rules,), "notes": (*recipe.notes, note)})
        trials = (Trial(recipe, -was, kept=False), Trial(result, -now, kept=True))
        return Learned(result, -now, trials)


def _rules(parameters: Sequence[str], plan: Plan, shares: Tensor) -> list[Rule]:
    """Return a rule for each of a layer's parameters, under its name in the checkpoint."""
    return [
        Rule(
            match=glob.escape(name),
            method=MethodChoice(name="average"),
            coefficients=tuple(float(share) for share in shares),
        )
        for parameter in parameters
        if (name := parameter_name(parameter, plan.reference)) in plan.tasks and name is not None
    ]
