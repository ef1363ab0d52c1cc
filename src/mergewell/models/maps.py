"""Maps: what the linear maps within a module are given, whatever module or function makes them.

A map is found by the parameter that it multiplies its input by: the weight of a linear layer, of a
convolution, of GPT-2's transposed layers, or the scale of a normalisation, which maps what was
normalised, each number by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mergewell.models.dataflow import parts
from mergewell.statistics.activation_gram import Window


@dataclass(frozen=True, slots=True)
class MapCall:
    """One call of a linear map."""

    parameter: str
    """Name of its weight."""

    inputs: Tensor
    """[..., I], or what a convolution slides over, [N, channels, ...]."""

    along: int
    """The weight's dimension that counts inputs: 1, or 0 where it is stored transposed."""

    window: Window | None = None

    single: bool = False
    """Whether each input is multiplied by a number of its own."""


_ADDMM = torch.addmm
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_SCALINGS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_NORMS: Mapping[Any, tuple[str, ...]] = {
    functional.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    functional.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    functional.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    functional.batch_norm: (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    ),
}  # fmt: skip
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def weights(module: nn.Module) -> dict[int, str]:
    """Return the names of the parameters called `weight` that maps may have, by identity.

    Give the whole model: embeddings are none, though a head that is tied to one maps with it.
    """
    embedded = {id(part.weight) for _, part in parts(module) if isinstance(part, nn.Embedding)}
    return {
        id(parameter): name
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] == "weight" and id(parameter) not in embedded
    }


class WatchingMaps(TorchFunctionMode):
    """While open, tells of every call of a linear map whose weight is one of these parameters."""

    def __init__(self, names: Mapping[int, str], see: Callable[[MapCall], None]) -> None:
        """Tell `see` of calls; `names` are those of `weights`."""
        super().__init__()
        self._names, self._see = names, see

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Carry out a function, after telling of it if it is a map."""
        kwargs = kwargs or {}
        if (found := self._map(func, args, kwargs)) is not None:
            self._see(found)
        return func(*args, **kwargs)

    def _map(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> MapCall | None:
        if func is functional.linear or func in _CONVOLUTIONS:
            given: dict[str, Any] = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            name = self._names.get(id(given["weight"]))
            if name is None:
                return None
            if func is functional.linear:
                return MapCall(name, given["input"], 1)
            inputs, window = given["input"], _window(given)
            alone = inputs.dim() == len(window.size) + 1
            return MapCall(name, inputs[None] if alone else inputs, 1, window)
        if func in _NORMS:
            return self._norm(func, {**dict(zip(_NORMS[func], args, strict=False)), **kwargs})
        if func in _SCALINGS and len(args) == 2:
            weight, inputs = args if id(args[0]) in self._names else args[::-1]
            name = self._names.get(id(weight))
            fits = isinstance(inputs, Tensor) and inputs.shape[-1:] == getattr(weight, "shape", 0)
            return MapCall(name, inputs, 1, single=True) if name is not None and fits else None
        if func in _PRODUCTS and len(args) == 2:
            inputs, weight = args
        elif func is _ADDMM and len(args) == 3:
            inputs, weight = args[1:]
        else:
            return None
        name = self._names.get(id(weight))
        return None if name is None else MapCall(name, inputs, 0)

    def _norm(self, func: Any, given: dict[str, Any]) -> MapCall | None:
        """Return the call of a normalisation's scale, on what it normalised."""
        name = self._names.get(id(given.get("weight")))
        if name is None or given["weight"].dim() != 1:
            return None
        plain = {key: None if key in ("weight", "bias") else value for key, value in given.items()}
        normal: Tensor = func(**plain)
        if func in (functional.batch_norm, functional.group_norm):
            normal = normal.movedim(1, -1)
        return MapCall(name, normal, 1, single=True)


def _window(given: Mapping[str, Any]) -> Window:
    size = tuple(given["weight"].shape[2:])

    def each(key: str, usual: int) -> tuple[int, ...]:
        value: Any = given.get(key, usual)
        if isinstance(value, int):
            return (value,) * len(size)
        found = tuple(int(part) for part in value)
        return found if len(found) == len(size) else found * len(size)

    dilation = each("dilation", 1)
    padding: Any = given.get("padding", 0)
    if isinstance(padding, str):
        whole = [
            (n - 1) * d if padding == "same" else 0 for n, d in zip(size, dilation, strict=True)
        ]
        pairs = tuple((total // 2, total - total // 2) for total in whole)
    else:
        pairs = tuple((zeros, zeros) for zeros in each("padding", 0))
    return Window(size, each("stride", 1), pairs, dilation, int(given.get("groups", 1)))
