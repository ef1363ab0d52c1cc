"""Training of corrections: the merged model's representations are brought near to one expert's.

Shapes: N samples, T tokens, C nodes of a representation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergewell.distil.outputs import seeing, unpadded
from mergewell.models.dataflow import Batch, call, evaluating
from mergewell.models.gradients import differentiable
from mergewell.surgery.correction import Corrected, Correction, node_dim, started

Seen = Mapping[str, Tensor]
"""Representations by place."""


@dataclass(frozen=True, slots=True)
class Schooling:
    """How corrections are trained."""

    rank: int
    steps: int
    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Schooled:
    """The corrections of one task, and the representation bias at the last place."""

    corrections: Mapping[str, Correction]

    before: float
    """Mean |z_merged - z_expert| over the inputs and nodes, without corrections."""

    after: float
    """The same with them; on the inputs they were trained on."""


def representations(
    module: nn.Module, places: Sequence[str], batches: Sequence[Batch]
) -> list[Seen]:
    """Return what a module gives at its places, by batch."""
    found: list[Seen] = []
    with evaluating([module]), seeing(module, places) as seen:
        for batch in batches:
            call(module, batch)
            found.append({place: seen[place] for place in places})
            seen.clear()
    return found


def school(
    module: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Seen],
    how: Schooling,
    *,
    on_step: Callable[[], object] | None = None,
) -> Schooled:
    """Return corrections of a merged module's representations towards `targets`, by batch.

    Minimises the sum over the places of the mean L1 distance, by Adam, a batch a step. The module
    comes back as it was. A single place needs one forward pass a batch; with several the network is
    run at every step, since a correction changes what the later places get.

    Source: methods.md A3 (v1: one place; v2: every block and the last).
    """
    places = list(targets[0])
    plain = representations(module, places, batches)
    generator = torch.Generator().manual_seed(how.seed)
    corrections = {
        place: started(hidden.shape[node_dim(hidden)], how.rank, generator)
        for place, hidden in plain[0].items()
    }
    parameters = [p for correction in corrections.values() for p in correction.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=how.rate)
    with ExitStack() as stack:
        stack.enter_context(evaluating([module]))
        stack.enter_context(differentiable(module, []))
        give = _fixed(plain, corrections) if len(places) == 1 else _live(
            stack, module, batches, corrections
        )  # fmt: skip
        for step in range(how.steps):
            index = step % len(batches)
            optimiser.zero_grad()
            with torch.enable_grad():
                given = give(index)
                torch.autograd.backward([sum_of(biases(batches[index], given, targets[index]))])
            optimiser.step()
            if on_step is not None:
                on_step()
        ends = [give(index) for index in range(len(batches))]
    last = places[-1]
    sides = [
        sum(float(biases(b, g, t)[last]) for b, g, t in zip(batches, each, targets, strict=True))
        / len(batches)
        for each in (plain, ends)
    ]
    for parameter in parameters:
        parameter.grad = None
    return Schooled(corrections, *sides)


def biases(batch: Batch, given: Seen, wanted: Seen) -> dict[str, Tensor]:
    """Return the mean L1 distance at each place, padding left out."""
    return {
        place: (unpadded(batch, given[place]) - unpadded(batch, wanted[place])).abs().mean()
        for place in wanted
    }


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the losses."""
    return torch.stack(list(parts.values())).sum()


def _fixed(plain: Sequence[Seen], corrections: Mapping[str, Correction]) -> Callable[[int], Seen]:
    """Return what gives corrected representations that no other correction changes."""
    return lambda index: {place: corrections[place](z) for place, z in plain[index].items()}


def _live(
    stack: ExitStack,
    module: nn.Module,
    batches: Sequence[Batch],
    corrections: Mapping[str, Correction],
) -> Callable[[int], Seen]:
    """Return what runs the corrected network; the hooks go when the stack does."""
    corrected = Corrected(module, corrections)
    stack.callback(corrected.remove)
    seen = stack.enter_context(seeing(module, list(corrections)))

    def give(index: int) -> Seen:
        seen.clear()
        call(corrected, batches[index])
        return {place: seen[place] for place in corrections}

    return give
