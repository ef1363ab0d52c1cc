"""Correction: z - U relu(D z), added behind modules of a network whose weights stay as they are.

Shapes: N samples, T tokens, C nodes of a representation, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mergewell.distil.outputs import first, submodule, with_first
from mergewell.errors import ModelError
from mergewell.models.cut import cut


class Correction(nn.Module):
    """z - U relu(D z) for every sample, token or place of an image; D [R, C], U [C, R].

    Source: Yang et al. 2024, "Representation Surgery", arXiv:2402.02705, section 4.2.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        """Take D [R, C] and U [C, R]."""
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)

    def forward(self, hidden: Tensor) -> Tensor:
        """Correct [N, C], [N, T, C] or, of images, [N, C, height, width].

        Raises:
            ModelError: the representation has another width.
        """
        dim = node_dim(hidden)
        if hidden.shape[dim] != self.down.shape[1]:
            raise ModelError(
                f"A correction of {self.down.shape[1]} nodes was given a representation of "
                f"{hidden.shape[dim]}; load the companion of this architecture."
            )
        last = hidden.movedim(dim, -1)
        bias = (last @ self.down.T).relu() @ self.up.T
        return hidden - bias.movedim(-1, dim)


class Corrected(nn.Module):
    """A network with corrections behind some of its modules; it is called as the network is."""

    def __init__(self, module: nn.Module, corrections: Mapping[str, Correction]) -> None:
        """Put corrections behind modules, by their names; the empty one is the whole network.

        Raises:
            ModelError: the network has no such module.
        """
        super().__init__()
        self.module = module
        self.places = (*corrections,)
        self.corrections = nn.ModuleList(corrections.values())
        self._hooks: list[RemovableHandle] = []
        for place, correction in corrections.items():

            def correct(_: nn.Module, _args: Any, output: Any, place: str = place,
                        correction: Correction = correction) -> Any:  # fmt: skip
                return with_first(output, correction(first(output, place)))

            self._hooks.append(submodule(module, place).register_forward_hook(correct))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns, corrected on the way."""
        return self.module(*args, **kwargs)

    def remove(self) -> None:
        """Let the network be as it was."""
        for hook in self._hooks:
            hook.remove()


def started(width: int, rank: int, generator: torch.Generator) -> Correction:
    """Return the correction that training begins with: U = 0, so that it does nothing yet.

    D is drawn as torch's linear layers are: uniform within 1 / sqrt(C).
    """
    bound = 1 / math.sqrt(width)
    down = (2 * torch.rand(rank, width, generator=generator) - 1) * bound
    return Correction(down, torch.zeros(width, rank))


def node_dim(hidden: Tensor) -> int:
    """Return the dimension of the nodes: 1 of images [N, C, height, width], else the last."""
    return 1 if hidden.dim() >= 4 else -1


def block_names(module: nn.Module) -> Sequence[str]:
    """Return the names of a network's repeated blocks, in order."""
    return [name for piece in cut(module) if piece.is_block for name in piece.modules]
