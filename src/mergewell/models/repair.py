"""REPAIR: give an interpolated module the endpoints' interpolated activation moments.

Shapes: C channels (nodes); a moment is [C] in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.errors import DataError, ModelError
from mergewell.models.batch_norm import (
    NORMS,
    Repaired,
    batch_norms,
    channel_sums,
    layer_of,
    mean_of,
    moments_by_batch,
    set_moments,
    variance_of,
)
from mergewell.models.dataflow import Batch, call, evaluating, parts, tensors
from mergewell.models.ensemble import simplex
from mergewell.statistics.base import State, joined

_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLAT = 1e-12  # a channel whose variance is smaller is constant: it is shifted, not scaled


def repair(
    module: nn.Module,
    endpoints: Sequence[nn.Module],
    coefficients: Sequence[float],
    batches: Sequence[Batch],
) -> Repaired:
    """Give every layer of an interpolated module the endpoints' interpolated moments, in place.

    A linear layer or convolution without BatchNorm has each pre-activation z replaced by
    `(z - mean) / std * sum_j c_j std_j + sum_j c_j mean_j`; the affine map is folded into its
    weight and bias. BatchNorms are re-estimated in the same pass. The coefficients are on the
    simplex. Left alone, with the reason: what gives the module's output, has no bias, shares its
    weights, or is called more than once.

    Source: Jordan et al. 2023, "REPAIR", arXiv:2211.08403, section 3; methods.md B7.
    Departures: any number of endpoints. As in the paper's code all layers are corrected in one
    pass in which each is normalised by the batch at hand; padding counts as data.

    Raises:
        RecipeError: coefficients off the simplex.
        ModelError: there is nothing to repair, or an endpoint lacks a layer.
        DataError: no batches, a batch with one value a channel, or values that are not finite.
    """
    shares = simplex(coefficients, len(endpoints))
    if not batches:
        raise DataError("There are no batches to repair a module with; give some data.")
    names, untouched = _correctable(module, batches[0])
    norms = batch_norms(module)
    if not names and not norms:
        raise ModelError(
            f"{type(module).__name__} has no layer that can be repaired: neither a BatchNorm nor a "
            "linear layer or convolution with a bias before the output."
        )
    own = [_output_moments(endpoint, names, batches) for endpoint in endpoints]
    goals = {
        name: (
            torch.stack([c * mean_of(s, name) for c, s in zip(shares, own, strict=True)]).sum(0),
            torch.stack([c * _std(s, name) for c, s in zip(shares, own, strict=True)]).sum(0),
        )
        for name in names
    }
    state: State = {}

    def correct(name: str, z: Tensor) -> Tensor:
        nonlocal state
        seen = channel_sums(name, z, _node_dim(module, name))
        state = joined(state, seen)
        shape = [1] * z.dim()
        shape[_node_dim(module, name)] = -1
        factor, shift = _affine(seen, name, goals[name])
        return z * factor.to(z.dtype).view(shape) + shift.to(z.dtype).view(shape)

    with _hooked(module, names, correct):
        for seen in moments_by_batch(module, batches):
            state = joined(state, seen)
    for name in names:
        part: Any = module.get_submodule(name)
        factor, shift = _affine(state, name, goals[name])
        with torch.no_grad():
            scale = factor.view(-1, *[1] * (part.weight.dim() - 1))
            part.weight.copy_(part.weight.double() * scale)
            part.bias.copy_(part.bias.double() * factor + shift)
    if not norms:
        return Repaired(tuple(names), untouched)
    done = set_moments(
        module, {key: value for key, value in state.items() if layer_of(key) in norms}
    )
    return Repaired((*done.layers, *names), {**done.untouched, **untouched})


@contextmanager
def _hooked(
    module: nn.Module, names: Iterable[str], change: Callable[[str, Tensor], Tensor]
) -> Generator[None]:
    """Replace what layers return by what `change` makes of it."""

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(_part: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return change(name, output)

        return hook

    with ExitStack() as hooks:
        for name in names:
            handle = module.get_submodule(name).register_forward_hook(watch(name))
            hooks.callback(handle.remove)
        yield


def _output_moments(module: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> State:
    """Return the moments of layers' outputs in a module as it stands, in eval mode."""
    known = {name for name, _ in parts(module)}
    for name in names:
        if name not in known:
            raise ModelError(
                f"An endpoint has no layer {name!r}; give endpoints of the module's architecture."
            )
    state: State = {}

    def note(name: str, z: Tensor) -> Tensor:
        nonlocal state
        state = joined(state, channel_sums(name, z, _node_dim(module, name)))
        return z

    with evaluating([module]), _hooked(module, names, note):
        for batch in batches:
            call(module, batch)
    return state


def _correctable(module: nn.Module, batch: Batch) -> tuple[list[str], dict[str, str]]:
    """Return the layers whose outputs can be corrected, in forward order, and the others."""
    outputs: dict[str, list[Tensor]] = {}
    normalised: list[Tensor] = []
    with evaluating([module]), ExitStack() as hooks:
        for name, part in parts(module):
            if isinstance(part, _MAPS):

                def note(_part: Any, _args: Any, output: Tensor, name: str = name) -> None:
                    outputs.setdefault(name, []).append(output)

                hooks.callback(part.register_forward_hook(note).remove)
            elif isinstance(part, NORMS):

                def take(_part: Any, args: tuple[Any, ...]) -> None:
                    normalised.append(args[0])

                hooks.callback(part.register_forward_pre_hook(take).remove)
        results = tensors(call(module, batch))
    owners: dict[int, int] = {}
    for _, part in parts(module):
        for parameter in part.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    untouched: dict[str, str] = {}
    for name, part in parts(module):
        if isinstance(part, _MAPS) and name not in outputs:
            untouched[name] = "not reached by the forward pass"
    names: list[str] = []
    for name, given in outputs.items():
        layer: Any = module.get_submodule(name)
        if len(given) > 1:
            untouched[name] = f"called {len(given)} times in one forward pass"
        elif any(given[0] is seen for seen in normalised):
            untouched[name] = "a BatchNorm follows it"
        elif any(given[0] is result for result in results):
            untouched[name] = "gives the module's output"
        elif layer.bias is None:
            untouched[name] = "has no bias to fold the shift into"
        elif any(owners[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            untouched[name] = "shares its parameters with another layer"
        else:
            names.append(name)
    return names, untouched


def _node_dim(module: nn.Module, name: str) -> int:
    return -1 if isinstance(module.get_submodule(name), nn.Linear) else 1


def _std(state: State, name: str) -> Tensor:
    return variance_of(state, name, 0).sqrt()


def _affine(state: State, name: str, goal: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return factor and shift that give values of these moments the goal's mean and std."""
    mean, std = mean_of(state, name), _std(state, name)
    flat = std.square() <= _FLAT * mean.square().clamp(min=_FLAT)
    factor = torch.where(flat, 1.0, goal[1] / torch.where(flat, 1.0, std))
    return factor, goal[0] - factor * mean
