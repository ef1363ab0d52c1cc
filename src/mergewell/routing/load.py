"""Load: a router as a module, of a merged folder, its companion, and any module that fits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mergewell.companions.base import base_of, companion_of, open_companion, require_pair
from mergewell.companions.mass import Mass
from mergewell.companions.ops import bias_of
from mergewell.companions.smile import Smile
from mergewell.errors import ModelError, did_you_mean
from mergewell.models.loader import load_state
from mergewell.restore import companion_in
from mergewell.routing.experts import LowRankExperts
from mergewell.routing.places import Place, places_of
from mergewell.routing.subspaces import Subspaces, TwoPasses
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint

_KEYS = ("left", "values", "right", "bias")


@dataclass(frozen=True, slots=True)
class Routed:
    """A router, and what it costs beside one model."""

    module: nn.Module
    """Called as the module that was given."""

    layers: int
    """Linear maps and convolutions whose weights depend on the input."""

    parameters: int
    """Numbers that are held beside the module's own."""

    passes: int
    """Times that each input goes through the module."""

    added: float
    """Multiply-adds that each pass adds, as a share of the routed layers' own, their positions left
    aside. Merging a choice anew (MASS) comes on top whenever it is not among those held."""

    absent: tuple[str, ...]
    """Routed tensors that the module does not have, such as a head's."""


def route(
    module: nn.Module,
    folder: str | Path,
    *,
    companion: str | Path | None = None,
    base: Checkpoint | None = None,
) -> Routed:
    """Return a router made of a module, a merged folder and its companion `smile` or `mass`.

    What comes out is no merged model: it holds all experts, in low rank, and each input chooses
    among them. The module gets the folder's weights, in place, and hooks for `smile`; for `mass`
    it is put into another. Parts are found by their tensors, whatever the architecture. `base` is
    opened where the companion says it was, unless given.

    Raises:
        CheckpointError: no companion, one of another merge, or no base.
        ModelError: the module does not take the weights, the companion routes nothing (masks), or
            a routed tensor is used by what is no plain linear map or convolution.
    """
    merged = open_checkpoint(folder)
    held = open_companion(companion if companion is not None else companion_in(Path(folder)))
    require_pair(merged, held)
    own = companion_of(held)
    if not isinstance(own, Smile | Mass):
        raise ModelError(
            f"{held.path} holds {own.component_name()} masks, which give an expert back and route "
            "nothing; use `restore --expert NAME`."
        )
    load_state(module, merged)
    start = base if base is not None else base_of(held)
    names = [name.removesuffix(".left") for name in held if name.endswith(".left")]
    places = places_of(module, names)
    if not any(places.values()):
        raise ModelError(f"{type(module).__name__} has none of the tensors that are routed.")
    absent = tuple(name for name in names if not places.get(name))
    found = {name: spots for name, spots in places.items() if spots}
    make = _smile if isinstance(own, Smile) else _mass
    return make(module, own, held, start, found, absent)  # type: ignore[arg-type]


def _smile(
    module: nn.Module,
    own: Smile,
    held: Checkpoint,
    base: Checkpoint,
    places: Mapping[str, list[Place]],
    absent: tuple[str, ...],
) -> Routed:
    numbers = work = plain = 0
    for name, spots in places.items():
        factors, weight = _factors(held, name), base[name]
        count, rows, rank = factors["left"].shape
        columns = factors["right"].shape[1]
        with torch.no_grad():
            for place in spots:
                _copied(place.part, "weight", weight)
                if "bias" in factors and place.biased:
                    _copied(place.part, "bias", base[bias_of(name)])
        plain += rows * columns * len(spots)
        if rank:
            for place in spots:
                experts = LowRankExperts(place, own, factors)
                place.part.register_forward_hook(experts, with_kwargs=True)
                place.part.add_module("low_rank_experts", experts)
                numbers += sum(t.numel() for t in (*experts.buffers(), *experts.parameters()))
                work += count * rank * (rows + columns)
    layers = sum(len(spots) for spots in places.values())
    return Routed(module, layers, numbers, 1, work / plain, absent)


def _mass(
    module: nn.Module,
    own: Mass,
    held: Checkpoint,
    base: Checkpoint,
    places: Mapping[str, list[Place]],
    absent: tuple[str, ...],
) -> Routed:
    at = list(places) if own.at is None else [own.at]
    if own.at is not None and own.at not in places:
        raise ModelError(f"mass: at = {own.at!r} is not routed: {did_you_mean(own.at, places)}")
    subspaces: dict[str, tuple[Subspaces, list[Place]]] = {}
    numbers = work = plain = 0
    for name, spots in places.items():
        factors = _factors(held, name)
        bias = base[bias_of(name)].to(torch.float32) if "bias" in factors else None
        found = Subspaces(base[name].to(torch.float32), factors, bias)
        subspaces[name] = (found, spots)
        numbers += sum(tensor.numel() for tensor in found.buffers())
        count, rows, rank = factors["left"].shape
        columns = factors["right"].shape[1]
        plain += rows * columns
        work += count * rank * columns if name in at else 0
    layers = sum(len(spots) for spots in places.values())
    router = TwoPasses(module, own, subspaces, at).eval()
    return Routed(router, layers, numbers, 2, work / plain / 2, absent)


def _factors(held: Checkpoint, name: str) -> dict[str, Tensor]:
    keys = [key for key in _KEYS if f"{name}.{key}" in held]
    return {key: held[f"{name}.{key}"].to(torch.float32) for key in keys}


def _copied(part: nn.Module, key: str, tensor: Tensor) -> None:
    cast("Tensor", getattr(part, key)).copy_(tensor)
