"""Portland: one linear layer from all experts' embeddings of an input to a coefficient for each.

Shapes: N samples, K experts, D features, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mergewell.descent.tasks import LearningTask
from mergewell.models.barrier import first_output
from mergewell.models.dataflow import evaluating
from mergewell.models.loader import load_state
from mergewell.plan import Plan

OnStep = Callable[[str, int, int], None]


class Portland(nn.Module):
    """A softmax of one linear layer: embeddings [N, K, D] to coefficients [N, K].

    Source: NeuLig (papers.md 2.3): K (K D + 1) parameters, the coefficients differ by sample.
    """

    def __init__(self, experts: int, features: int, *, seed: int = 0) -> None:
        """Make the network with torch's own initial weights under a seed."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(experts * features, experts)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the coefficients of each sample, [N, K], on the simplex."""
        return self.linear(embeddings.flatten(1)).softmax(-1)


class Constant(nn.Module):
    """The same coefficients for every input: what is left when the router is taken away."""

    def __init__(self, experts: int) -> None:
        """Begin with equal coefficients."""
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(experts))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the coefficients once for each sample, [N, K]."""
        return self.logits.softmax(-1).expand(len(embeddings), -1)


def embeddings(
    plan: Plan,
    factory: Callable[[], nn.Module],
    tasks: Sequence[LearningTask],
    *,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Return what every expert makes of every task's inputs: T tensors [N, K, D].

    The module's first output, before the head; of sequences the mean over the positions. One
    expert is in memory at a time.
    """
    module = factory()
    found: list[list[Tensor]] = [[] for _ in tasks]
    for number, expert in enumerate(plan.experts):
        load_state(module, {name: expert[name] for name in expert})
        with evaluating([module]):
            for task, seen in zip(tasks, found, strict=True):
                outputs = [first_output(module, batch) for batch in task.batches]
                seen.append(torch.cat(outputs))
        if on_step is not None:
            on_step("experts", number + 1, len(plan.experts))
    return [torch.stack(seen, 1) for seen in found]


def pooled(outputs: Tensor) -> Tensor:
    """Return embeddings [N, K, D] of outputs [N, K, ..., D]: the mean over what lies between."""
    return outputs.flatten(2, -2).mean(2) if outputs.dim() > 3 else outputs
