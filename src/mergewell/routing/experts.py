"""Low-rank experts beside one linear map or convolution, chosen at each call (SMILE).

Shapes: K experts, r directions, I inputs, O outputs, ... samples and positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergewell.companions.smile import Smile
from mergewell.routing.places import Place


class LowRankExperts(nn.Module):
    """A hook of a part: adds what the chosen experts have beside the base."""

    def __init__(self, place: Place, own: Smile, factors: Mapping[str, Tensor]) -> None:
        """Take the place and what the companion holds of its weight, by key."""
        super().__init__()
        turned = place.kind == "turned"
        inputs, outputs = (factors[key] for key in (("left", "right") if turned else _STRAIGHT))
        self.count, _, self.rank = inputs.shape
        self.own, self.channel = own, place.channel
        self.inward = place.with_weight(inputs.permute(1, 0, 2).flatten(1))
        lengthened = outputs * factors["values"][:, None]
        self.register_buffer("outward", lengthened.permute(0, 2, 1).flatten(0, 1))  # [K r, O]
        self.register_buffer("biases", factors.get("bias") if place.biased else None)

    def forward(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """Return the part's output plus that of the experts; it is called as a hook."""
        del part
        found = self.inward(*args, **kwargs).movedim(self.channel, -1)
        found = found.unflatten(-1, (self.count, self.rank))
        gates = self.gates(found[..., : self.own.router_rank].square().sum(-1))
        added = (found * gates[..., None]).flatten(-2) @ cast("Tensor", self.outward)
        biases = cast("Tensor | None", self.biases)
        if biases is not None:
            added = added + gates @ biases
        return output + added.movedim(-1, self.channel)

    def gates(self, energies: Tensor) -> Tensor:
        """Return the weight of every expert [..., K] from the squares of the norms [..., K]."""
        if self.own.per == "sample" and energies.ndim > 2:
            dims = tuple(range(1, energies.ndim - 1))
            energies = energies.mean(dims, keepdim=True).expand_as(energies)
        norms, chosen = energies.sqrt().topk(min(self.own.top, self.count), dim=-1)
        shares = norms.softmax(-1)
        if self.own.weigh == "equal":
            shares = torch.full_like(norms, 1 / norms.shape[-1])
        return torch.zeros_like(energies).scatter(-1, chosen, shares)


_STRAIGHT = ("right", "left")
