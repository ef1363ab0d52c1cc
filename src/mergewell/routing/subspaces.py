"""A module that runs twice: to see which experts hold an input, and merged of those (MASS).

Shapes: B samples, K experts, r directions, O rows and I columns of a weight as it is stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from mergewell import linalg
from mergewell.companions.mass import Mass
from mergewell.errors import ModelError
from mergewell.models.dataflow import tensors
from mergewell.routing.places import Place

Choice = tuple[int, ...]
"""The rows of the experts that a sample goes through, in their order."""


class Subspaces(nn.Module):
    """The directions of every expert's task vector of one weight."""

    def __init__(self, base: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Take the base's weight and bias, and what the companion holds of them, by key."""
        super().__init__()
        for key, tensor in {"base": base, **factors}.items():
            self.register_buffer(key if key != "bias" else "biases", tensor)
        self.register_buffer("base_bias", bias)

    def residuals(self, seen: Tensor, *, turned: bool) -> Tensor:
        """Return the share of each vector [B, I] outside of each expert's subspace, [B, K]."""
        inputs = cast("Tensor", self.left if turned else self.right)
        whole = seen.square().sum(-1, keepdim=True)
        held = torch.einsum("bi,kir->bkr", seen, inputs).square().sum(-1)
        return ((whole - held).clamp(min=0) / whole.clamp(min=1e-30)).sqrt()

    def weight(self, choice: Choice) -> Tensor:
        """Return the base plus the merge of the chosen experts' directions (TSV-M)."""
        base, values = cast("Tensor", self.base), cast("Tensor", self.values)
        rows = list(choice)
        lengths = values[rows].flatten()
        known = lengths > 0  # those that an expert lacks are zeros
        sides = [cast("Tensor", side)[rows] for side in (self.left, self.right)]
        left, right = (s.permute(1, 0, 2).flatten(1)[:, known] for s in sides)
        if len(choice) > 1:  # those of one expert are orthonormal
            left, right = linalg.polar(left), linalg.polar(right)
        return base + ((left * lengths[known]) @ right.T).view(base.shape)

    def bias(self, choice: Choice) -> Tensor:
        """Return the base's bias plus the mean of the chosen experts' changes."""
        changes = cast("Tensor", self.biases)[list(choice)]
        return cast("Tensor", self.base_bias) + changes.mean(0)


class TwoPasses(nn.Module):
    """A merged module, and beside it what its weights become for a choice of experts."""

    def __init__(
        self,
        module: nn.Module,
        own: Mass,
        subspaces: Mapping[str, tuple[Subspaces, Sequence[Place]]],
        at: Sequence[str],
        *,
        held: int = 8,
    ) -> None:
        """Take a module with merged weights, and subspaces and places by the weight's name.

        at: names of the weights whose inputs are looked at; held: choices whose weights are kept.
        """
        super().__init__()
        self.module, self.own, self.limit = module, own, held
        self.subspaces = nn.ModuleList(found for found, _ in subspaces.values())
        self._places = [
            [(place.path, place.biased) for place in places] for _, places in subspaces.values()
        ]
        self._watched = [(subspaces[name][0], subspaces[name][1][0]) for name in at]
        self.seers = nn.ModuleList(place.seer() for _, place in self._watched)
        self._weights: OrderedDict[Choice, dict[str, Tensor]] = OrderedDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module makes of each sample with the weights of its choice.

        Raises:
            ModelError: samples of one batch go different ways, and something that the module
                returns cannot be put together again.
        """
        with torch.no_grad():
            choices = self.choices(*args, **kwargs)
        groups: dict[Choice, list[int]] = {}
        for row, choice in enumerate(choices):
            groups.setdefault(choice, []).append(row)
        if len(groups) == 1:
            return self._run(choices[0], args, kwargs)
        made = [
            (rows, self._run(choice, *_taken((args, kwargs), rows, len(choices))))
            for choice, rows in groups.items()
        ]
        return _joined(made)

    def choices(self, *args: Any, **kwargs: Any) -> list[Choice]:
        """Return the experts that each sample goes through, by a pass of the merged module."""
        samples = len(tensors((args, kwargs))[0])
        seen: list[Tensor] = []

        def watch(found: Subspaces, place: Place, seer: nn.Module) -> Any:
            def hook(_part: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
                rows = seer(tensors((given, named))[0]).movedim(place.channel, -1)
                at = rows.reshape(samples, -1, rows.shape[-1])
                pooled = at.mean(1) if self.own.pool == "mean" else at[:, 0]
                seen.append(found.residuals(pooled, turned=place.kind == "turned"))

            return hook

        with ExitStack() as hooks:
            for (found, place), seer in zip(self._watched, self.seers, strict=True):
                hook = watch(found, place, seer)
                removable = place.part.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(removable.remove)
            self.module(*args, **kwargs)
        if not seen:
            raise ModelError("No layer whose inputs are to be looked at was called; name another.")
        residuals = torch.stack(seen).mean(0)
        if self.own.per == "batch":
            residuals = residuals.mean(0, keepdim=True).expand_as(residuals)
        return [self._choice(row) for row in residuals]

    def _choice(self, residuals: Tensor) -> Choice:
        spread = residuals.std(correction=0).clamp(min=1e-12)
        logits = (residuals.mean() - residuals) / spread
        shares, rows = (logits / self.own.temperature).softmax(0).sort(descending=True)
        count = max(1, int((shares[: self.own.most] > self.own.threshold).sum()))
        return tuple(sorted(int(row) for row in rows[:count]))

    def _run(self, choice: Choice, args: Any, kwargs: Any) -> Any:
        if choice not in self._weights:
            self._weights[choice] = self._merged(choice)
        self._weights.move_to_end(choice)
        if len(self._weights) > self.limit:
            self._weights.popitem(last=False)
        return functional_call(self.module, self._weights[choice], args, kwargs)

    @torch.no_grad()
    def _merged(self, choice: Choice) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for held, places in zip(self.subspaces, self._places, strict=True):
            found = cast("Subspaces", held)
            made |= dict.fromkeys((f"{path}.weight" for path, _ in places), found.weight(choice))
            biased = [f"{path}.bias" for path, has in places if has]
            if biased and cast("Tensor | None", found.base_bias) is not None:
                made |= dict.fromkeys(biased, found.bias(choice))
        return made


def _taken(tree: Any, rows: Sequence[int], samples: int) -> Any:
    """Return a tree with these samples of every tensor that has an entry a sample."""

    def take(tensor: Tensor) -> Tensor:
        return tensor[list(rows)] if tensor.ndim and len(tensor) == samples else tensor

    return tree_map_only(Tensor, take, tree)


def _joined(made: Sequence[tuple[Sequence[int], Any]]) -> Any:
    """Return one tree with an entry a sample from those of groups of samples."""
    flat = [tree_flatten(tree) for _, tree in made]
    order = torch.tensor([row for rows, _ in made for row in rows]).argsort()
    joined: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        fits = [
            isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(rows)
            for leaf, (rows, _) in zip(leaves, made, strict=True)
        ]
        if not all(fits) and any(leaf is not leaves[0] for leaf in leaves):
            raise ModelError(
                "The module returns what is not one entry a sample, so a batch cannot be routed "
                "sample by sample; write the companion with per=batch, or give one sample a call."
            )
        whole = torch.cat(leaves)[order.to(leaves[0].device)] if all(fits) else leaves[0]
        joined.append(whole)
    return tree_unflatten(joined, flat[0][1])
