"""Gram matrix of a linear layer's inputs, h^T h summed over all observations.

Shapes: R rows (observations), G groups of inputs, I inputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value

_ROOM = 1 << 22
"""Numbers of unfolded inputs that are held at a time."""


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution slides over its input; one entry for each dimension in space."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Zeros before and behind."""

    dilation: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one linear layer of one model was given for one batch."""

    inputs: Tensor
    """[..., I], the other dimensions count observations; of a convolution, [N, channels, ...]."""

    keep: Tensor | None = None
    """Boolean, the shape of the inputs without I; false on padding."""

    window: Window | None = None
    """Of a convolution, whose observations are the patches under its window."""

    single: bool = False
    """Whether each input is a group of its own, as a normalisation's scale takes them."""

    def rows(self) -> Iterator[Tensor]:
        """Yield the observations that count, a part at a time, [R, G, I].

        A patch's inputs stand in the order of the weight's: channels, then places in the window.
        """
        if self.window is None:
            found = self.inputs.flatten(0, -2) if self.keep is None else self.inputs[self.keep]
            for part in torch.split(found, max(1, _ROOM // max(1, found.shape[-1]))):
                yield part[:, :, None] if self.single else part[:, None]
            return
        each = self.inputs[0].numel() * math.prod(self.window.size) if len(self.inputs) else 1
        for part in torch.split(self.inputs, max(1, _ROOM // each)):
            yield _patches(part, self.window)


class ActivationGram(Statistic[LayerInputs]):
    """Sum of h h^T over all observations h of a layer's input, [I, I], or [G, I, I] of G groups.

    Source: Jin et al. 2023, "RegMean", arXiv:2212.09849, equation 2. Departures: padding is left
    out; convolutions are linear maps of their patches, group by group. Products and sums are made
    in float64, so that few observations give a matrix of their rank and no negative eigenvalue.
    """

    def update(self, state: State, batch: LayerInputs) -> State:
        """Return the state with one more batch."""
        for rows in batch.rows():
            columns = rows.to(torch.float64).movedim(0, 1)  # [G, R, I]
            gram = columns.mT @ columns
            count = torch.tensor(len(rows), dtype=torch.float64)
            grouped = batch.single or len(gram) > 1
            state = self.join(state, {"gram": gram if grouped else gram[0], "count": count})
        return state

    def value(self, state: State) -> Value:
        """Return `gram` [I, I] or [G, I, I] and `count` [], float64."""
        return state


def _patches(inputs: Tensor, window: Window) -> Tensor:
    """Return the patches of [N, channels, ...], [R, G, I]."""
    padded = functional.pad(inputs, list(chain.from_iterable(window.padding[::-1])))
    for place, (size, stride, step) in enumerate(
        zip(window.size, window.stride, window.dilation, strict=True), 2
    ):
        padded = padded.unfold(place, (size - 1) * step + 1, stride)[..., ::step]
    laid = padded.movedim(1, -1 - len(window.size))  # [N, *places, channels, *window]
    inputs_of_group = padded.shape[1] // window.groups * math.prod(window.size)
    return laid.reshape(-1, window.groups, inputs_of_group)
