"""Places: which parts of a module use a tensor as the weight of a linear map of their inputs.

Shapes: O outputs, I inputs (of a convolution: of a patch).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.models.dataflow import parts
from mergewell.models.loader import placed

Kind = Literal["linear", "turned", "convolution"]
"""A linear map, one that is stored as inputs by outputs (GPT-2's Conv1D), or a convolution."""


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a module that uses a tensor as its weight."""

    path: str
    part: nn.Module
    kind: Kind

    @property
    def channel(self) -> int:
        """The dimension of the part's outputs that counts them, from the end."""
        weight = cast("Tensor", self.part.weight)
        return 1 - weight.ndim if self.kind == "convolution" else -1

    @property
    def biased(self) -> bool:
        """Whether the part adds a bias."""
        return getattr(self.part, "bias", None) is not None

    def with_weight(self, inputs: Tensor) -> nn.Module:
        """Return a copy of the part that gives the products of its inputs with columns [I, n].

        It pads, strides and reshapes as the part itself does, of whatever subclass it is.
        """
        part: Any = copy.deepcopy(self.part)
        weight = cast("Tensor", self.part.weight)
        if self.kind == "turned":
            own = inputs.clone()
            part.nf = inputs.shape[1]
            part.bias = nn.Parameter(torch.zeros(inputs.shape[1]), requires_grad=False)
        else:
            own = inputs.T.reshape(-1, *weight.shape[1:]).clone()
            part.bias = None
        part.weight = nn.Parameter(own, requires_grad=False)
        return part

    def seer(self) -> nn.Module:
        """Return a module that makes of the part's inputs what it multiplies with its weight.

        Of a convolution those are patches, as channels of a map.
        """
        weight = cast("Tensor", self.part.weight)
        held: Any = self.part
        if self.kind != "convolution" or (
            prod(weight.shape[2:]) == 1 and set(held.stride) == {1} and not any(held.padding)
        ):
            return nn.Identity()
        return self.with_weight(torch.eye(prod(weight.shape[1:])).to(weight))


def places_of(module: nn.Module, names: Sequence[str]) -> dict[str, list[Place]]:
    """Return the parts that use each of a checkpoint's tensors; all that share a tied one.

    Names are matched as `load_state` matches them; those that the module lacks are left out.

    Raises:
        ModelError: a tensor is used by what is no plain linear map or convolution.
    """
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, part in parts(module):
        for key, tensor in part.named_parameters(recurse=False):
            users.setdefault(id(tensor), []).append((path, part, key))
    stored: Mapping[str, Tensor] = placed(module, names)
    return {
        name: [_place(name, *user) for user in users.get(id(tensor), [])]
        for name, tensor in stored.items()
    }


def _place(name: str, path: str, part: nn.Module, key: str) -> Place:
    held: Any = part
    hidden = isinstance(part, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if key == "weight" and isinstance(part, nn.Linear) and not hidden:
        return Place(path, part, "linear")
    plain = isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if key == "weight" and plain and held.groups == 1:
        return Place(path, part, "convolution")
    if key == "weight" and type(part).__name__ == "Conv1D" and hasattr(part, "nf"):
        return Place(path, part, "turned")
    raise ModelError(
        f"{name} is used by {path} ({type(part).__name__}) as no plain linear map or convolution, "
        "so it cannot be routed; exclude it when the companion is written, such as "
        "smile:exclude=PATTERN."
    )
