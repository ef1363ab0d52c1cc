"""Agreement: the merged model's answers held against those of the ensemble it stands for.

Shapes: N samples, K experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergewell.descent.tasks import LearningTask
from mergewell.models.barrier import first_output
from mergewell.models.dataflow import Batch, evaluating
from mergewell.models.loader import load_state
from mergewell.neulig.modes import Merges, recipe_of
from mergewell.plan import make_plan
from mergewell.recipe import Recipe
from mergewell.run import merge_tensors


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a merge and its ensemble answer the same inputs of one task."""

    merged: float
    """Fraction of right answers; nan without labels."""

    ensemble: float
    disagreement: float
    """Fraction of inputs on which they answer otherwise."""

    divergence: float
    """Mean KL(ensemble || merged), nats."""

    @property
    def gap(self) -> float:
        """Accuracy of the ensemble less that of the merge."""
        return self.ensemble - self.merged


def agreement(merged: Tensor, ensemble: Tensor, labels: Tensor | None) -> Agreement:
    """Return how two sets of logits [N, C] agree."""
    right = [float("nan")] * 2
    if labels is not None:
        right = [float((z.argmax(-1) == labels).double().mean()) for z in (merged, ensemble)]
    logs = ensemble.double().log_softmax(-1)
    apart = (logs.exp() * (logs - merged.double().log_softmax(-1))).sum(-1)
    return Agreement(
        right[0],
        right[1],
        float((merged.argmax(-1) != ensemble.argmax(-1)).double().mean()),
        float(apart.mean()),
    )


def merged_logits(
    recipe: Recipe, factory: Callable[[], nn.Module], task: LearningTask, merges: Merges
) -> Tensor:
    """Return the answers [N, C] of the merged models, each to the inputs that it owns.

    One merged model is made, and in memory, at a time; mode "sample" makes N of them.
    """
    module = factory()
    answers: dict[int, Tensor] = {}
    for number, coefficients in enumerate(merges.coefficients):
        rows = (merges.owner == number).nonzero().flatten()
        load_state(module, dict(merge_tensors(make_plan(recipe_of(recipe, coefficients)))))
        with evaluating([module]):
            for places, batch in _picked(task.batches, rows):
                output = first_output(module, batch)
                logits = output if task.head is None else task.head(output)
                answers |= dict(zip(places, logits, strict=True))
    return torch.stack([answers[place] for place in range(len(merges.owner))])


def _picked(batches: Sequence[Batch], rows: Tensor) -> Iterator[tuple[list[int], Batch]]:
    """Yield the places and inputs of the wanted rows, batch by batch."""
    start = 0
    for batch in batches:
        size = len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))
        here = rows[(rows >= start) & (rows < start + size)]
        if len(here):
            index = here - start
            part: Batch = (
                batch[index]
                if isinstance(batch, Tensor)
                else {name: tensor[index] for name, tensor in batch.items()}
            )
            yield here.tolist(), part
        start += size
