"""What candidates are judged by: how far their outputs are from a reference, without labels.

Shapes: N inputs, C classes or features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mergewell.descent.tasks import LearningTask, by_input, said
from mergewell.errors import ModelError, RecipeError
from mergewell.models.dataflow import evaluating
from mergewell.models.loader import load_state
from mergewell.plan import Plan

Reference = Literal["anchored", "expert", "ensemble", "mix", "answers"]
"""anchored: each input's own expert and the base, each as much as it is sure and not always of the
same; a task counts as its expert's share does. expert: the own expert alone. ensemble: the uniform
mean of all experts' outputs. mix: half of each. answers: mix, with 1 added to the loss of every
answer that is not the own expert's."""

Outputs = Literal["logits", "features"]
"""Logits are compared by KL in nats, features by one minus the cosine."""

_LEAST = 1e-3
"""Information of a model that always says the same, so that shares are defined."""

Losses = tuple[NDArray[np.float64], ...]
"""By task: the divergence of each input, [N]."""


class Objective(Protocol):
    """What candidates are judged by: a reference without labels, or any metric (`Goal`)."""

    def losses(self, module: nn.Module) -> Losses:
        """Return what each input costs, [N] by task; less is better, and N is 1 for one number.

        Every module gets the same inputs in the same order: candidates are compared in pairs.
        """
        ...


@dataclass(frozen=True, slots=True)
class Nearness:
    """The references, made once, and what a module is held against them by: an `Objective`."""

    tasks: Sequence[LearningTask]
    references: Sequence[Sequence[Tensor]]
    """By task and batch: probabilities, or features."""

    outputs: Outputs
    answers: Sequence[Sequence[Tensor]] | None = None
    """By task and batch: the own expert's answers, each of which counts 1 where it is not given."""

    weights: Sequence[float] | None = None
    """By task, 1 on average: what the task counts; all alike if None."""

    def losses(self, module: nn.Module) -> Losses:
        """Return the divergence reference || module of every input, by task.

        Raises:
            ModelError: outputs that are not finite.
        """
        found: list[NDArray[np.float64]] = []
        with evaluating([module]), torch.no_grad():
            for place, (task, references) in enumerate(
                zip(self.tasks, self.references, strict=True)
            ):
                parts: list[Tensor] = []
                for index, (batch, reference) in enumerate(
                    zip(task.batches, references, strict=True)
                ):
                    output = task.logits(module, batch)
                    rows = self._rows(output, reference)
                    if self.answers is not None:
                        rows = rows + (output.argmax(-1) != self.answers[place][index])
                    parts.append(by_input(rows, batch))
                weight = 1.0 if self.weights is None else self.weights[place]
                found.append(weight * torch.cat(parts).double().numpy())
        if not all(np.isfinite(values).all() for values in found):
            raise ModelError(
                "A candidate gives outputs that are not finite; check the experts' weights."
            )
        return tuple(found)

    def _rows(self, output: Tensor, reference: Tensor) -> Tensor:
        if self.outputs == "features":
            return 1 - functional.cosine_similarity(reference, output, dim=-1)
        logs = output.log_softmax(-1)
        return functional.kl_div(logs, reference, reduction="none").sum(-1)


def make_objective(
    reference: Reference,
    outputs: Outputs,
    tasks: Sequence[LearningTask],
    plan: Plan,
    factory: Callable[[], nn.Module],
) -> Nearness:
    """Return the objective; each expert is run once for each reference that it is part of.

    Labels of the tasks are not looked at.

    Raises:
        DataError: no task, one without inputs, or of no expert where that is the reference.
        RecipeError: answers or anchored where outputs are features; anchored without a base.
        UserError: as `load_state`.
    """
    if reference in ("answers", "anchored") and outputs == "features":
        raise RecipeError("Features give no answers; make the reference expert, ensemble or mix.")
    if reference == "anchored":
        references, shares = _anchored(tasks, plan, factory)
        weights = [share * len(shares) / sum(shares) for share in shares]
        return Nearness(tasks, references, outputs, weights=weights)
    with torch.no_grad():
        both = reference in ("mix", "answers")
        names = ("ensemble", "expert") if both else (reference,)
        made = [
            said("expert" if name == "expert" else "ensemble", tasks, plan, factory)
            for name in names
        ]
        shaped = [
            [[z if outputs == "features" else z.softmax(-1) for z in task] for task in one]
            for one in made
        ]
        mixed = [
            [torch.stack(parts).mean(0) for parts in zip(*batches, strict=True)]
            for batches in zip(*shaped, strict=True)
        ]
        answers = [[z.argmax(-1) for z in task] for task in made[-1]]
    return Nearness(tasks, mixed, outputs, answers if reference == "answers" else None)


@torch.no_grad()
def _anchored(
    tasks: Sequence[LearningTask], plan: Plan, factory: Callable[[], nn.Module]
) -> tuple[list[list[Tensor]], list[float]]:
    """Return the own expert's and the base's probabilities mixed, and each expert's share.

    A model's share goes with the square of the information that its answers carry on the task's
    inputs: the entropy of its mean answer less the mean entropy of its answers. An expert no better
    than its base is seldom much surer than it, and is then not imitated at the other tasks' cost.
    Shares are never 0.
    """
    if plan.base is None:
        raise RecipeError(
            "The reference anchored asks the base too; add --base PATH, or take another reference."
        )
    own = said("expert", tasks, plan, factory)
    module = factory()
    load_state(module, {name: plan.base[name] for name in plan.base})
    found: list[list[Tensor]] = []
    shares: list[float] = []
    with evaluating([module]):
        for task, logits in zip(tasks, own, strict=True):
            expert = [each.softmax(-1) for each in logits]
            base = [task.logits(module, batch).softmax(-1) for batch in task.batches]
            one, two = (_information(torch.cat(each)) ** 2 for each in (expert, base))
            share = one / (one + two)
            shares.append(share)
            found.append([torch.lerp(b, e, share) for e, b in zip(expert, base, strict=True)])
    return found, shares


def _information(probabilities: Tensor) -> float:
    """Return the mutual information between inputs and answers [N, C], in nats, never 0."""
    return max(float(_entropy(probabilities.mean(0)) - _entropy(probabilities).mean()), _LEAST)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)
