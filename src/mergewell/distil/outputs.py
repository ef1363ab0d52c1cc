"""Outputs: the first tensor that a module returns, seen or exchanged, and the distance of two.

Shapes: N samples, T tokens, C channels or nodes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from mergewell.calibration.data import kept
from mergewell.errors import ModelError
from mergewell.models.dataflow import Batch
from mergewell.models.walk import Call


def first(output: object, place: str) -> Tensor:
    """Return the first tensor of what the module called `place` returned.

    Raises:
        ModelError: it returned none.
    """
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            return leaf
    raise ModelError(f"{place or 'The network'} returns no tensor; name another module.")


def with_first(output: object, tensor: Tensor) -> Any:
    """Return an output with another tensor in the place of its first."""
    leaves, spec = tree_flatten(output)
    number = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[number] = tensor
    return tree_unflatten(leaves, spec)


def fresh(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a waiting call, copied: a module may write into what it is given."""
    return tree_map_only(Tensor, torch.clone, (call.args, call.kwargs))


def unpadded(batch: Batch, hidden: Tensor) -> Tensor:
    """Return hidden states without those of padding: [rows, C], or as they are without a mask."""
    mask = kept(batch, hidden)
    return hidden if mask is None else hidden[mask]


@contextmanager
def seeing(module: nn.Module, places: Sequence[str]) -> Generator[dict[str, Tensor]]:
    """Yield a mapping that holds, after each forward pass, what the places gave in it first.

    Raises:
        ModelError: the module has no such place.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for place in places:

            def hook(_: nn.Module, _args: Any, output: Any, place: str = place) -> None:
                seen[place] = first(output, place).clone()  # it may be written into

            handle = submodule(module, place).register_forward_hook(hook)
            hooks.callback(handle.remove)
        yield seen


def submodule(module: nn.Module, place: str) -> nn.Module:
    """Return a part of a module by its name; the empty one is the whole.

    Raises:
        ModelError: it has no such part.
    """
    try:
        return module.get_submodule(place)
    except AttributeError as error:
        raise ModelError(
            f"{type(module).__name__} has no module {place!r}; name one of its own."
        ) from error
