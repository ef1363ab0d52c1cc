"""Split: a module as features and a linear classifier, found by watching one forward pass.

Shapes: N samples, I features, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError, did_you_mean
from mergewell.labelled import first_output
from mergewell.models.dataflow import Batch, call, evaluating, parts
from mergewell.models.ensemble import simplex

_SAME = 1e-4  # of the outputs' largest: what float32 may lose in one long sum


@dataclass(frozen=True, slots=True)
class Head:
    """A linear classifier in float64."""

    weight: Tensor
    """Rows, [C, I]."""

    bias: Tensor
    """[C]; zeros where the layer has none."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits [N, C] of features [N, I]."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a module made of all samples, in float64."""

    features: Tensor
    """What the classifier is given, [N, I]."""

    logits: Tensor
    """What the module returned, [N, C]."""

    head: Head


def find_classifier(module: nn.Module, batch: Batch, *, name: str | None = None) -> str:
    """Return the name of the linear layer whose output is the module's output.

    Any module counts that holds a matrix `weight`, and a `bias` if any, and computes x W^T + b or
    x W + b; of several the last one called is taken, or the one that is named.

    Raises:
        ModelError: there is none, or the one named is not it; says which was called last.
    """
    known = {each for each, part in parts(module) if _matrix(part) is not None}
    if name is not None and name not in known:
        raise ModelError(
            f"{type(module).__name__} has no linear layer {name!r}: {did_you_mean(name, known)}"
        )
    seen: list[tuple[str, Tensor, Tensor]] = []
    with evaluating([module]), _watched(module, known, seen):
        result = first_output(module, call(module, batch))
    fitting = [
        each
        for each, given, made in seen
        if made.shape == result.shape
        and torch.equal(made, result)
        and made.dim() == 2
        and _head(module.get_submodule(each), given, made) is not None
    ]
    if fitting and name in (None, fitting[-1]):
        return fitting[-1]
    last = (
        f"the last linear layer called is {seen[-1][0]!r}" if seen else "no linear layer is called"
    )
    if result.dim() != 2:
        reason = f"it returns {tuple(result.shape)} and not one row of logits a sample"
    elif name is not None:
        reason = f"the output of {name!r} is not the module's output"
    else:
        reason = f"no linear layer's output is the module's output ({last})"
    raise ModelError(
        f"{type(module).__name__} cannot be split into features and a classifier: {reason}; wrap "
        "it in a module that returns the logits of its last linear layer."
    )


def run_split(module: nn.Module, classifier: str, batches: Iterable[Batch]) -> Outputs:
    """Return features, logits and head of a module on all batches.

    Raises:
        ModelError: the module has no such classifier.
    """
    if classifier not in {name for name, _ in parts(module)}:
        raise ModelError(
            f"{type(module).__name__} has no layer {classifier!r}; give experts of one "
            "architecture."
        )
    features: list[Tensor] = []
    logits: list[Tensor] = []
    head: Head | None = None
    part = module.get_submodule(classifier)
    with evaluating([module]):
        for batch in batches:
            seen: list[tuple[str, Tensor, Tensor]] = []
            with _watched(module, {classifier}, seen):
                logits.append(first_output(module, call(module, batch)).double())
            if len(seen) != 1:
                raise ModelError(
                    f"The classifier {classifier!r} is called {len(seen)} times in one forward "
                    "pass; it must be called once."
                )
            features.append(seen[0][1].double())
            head = head or _head(part, seen[0][1], seen[0][2])
    if head is None:
        raise ModelError(f"{classifier!r} is no linear layer on these data; name the classifier.")
    return Outputs(torch.cat(features), torch.cat(logits), head)


def soup(modules: Sequence[nn.Module], coefficients: Sequence[float] | None = None) -> nn.Module:
    """Return a new module whose parameters and buffers are the mean of the modules' own.

    Sums run in float64; integers are the first module's. Coefficients are 1/K unless given.

    Raises:
        RecipeError: no modules, or coefficients off the simplex.
        ModelError: a module lacks a tensor, or has it in another shape.
    """
    shares = simplex(coefficients, len(modules))
    merged = copy.deepcopy(modules[0])
    states = [module.state_dict() for module in modules]
    with torch.no_grad():
        for name, target in merged.state_dict(keep_vars=True).items():
            shapes = {tuple(state[name].shape) if name in state else None for state in states}
            if len(shapes) > 1:
                raise ModelError(
                    f"{name} differs in shape between the experts, or is missing in one; give "
                    "experts of one architecture."
                )
            if target.is_floating_point():
                summed = torch.zeros_like(target, dtype=torch.float64)
                for share, state in zip(shares, states, strict=True):
                    summed += share * state[name].double()
                target.copy_(summed)
    return merged


@contextmanager
def _watched(
    module: nn.Module, names: Iterable[str], seen: list[tuple[str, Tensor, Tensor]]
) -> Generator[None]:
    """Note input and output of each call of these layers, in the order of the calls."""
    with ExitStack() as hooks:
        for name in names:

            def note(_part: Any, args: tuple[Any, ...], output: object, name: str = name) -> None:
                if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    seen.append((name, args[0].clone(), output.clone()))

            hooks.callback(module.get_submodule(name).register_forward_hook(note).remove)
        yield


def _matrix(part: nn.Module) -> Tensor | None:
    weight = dict(part.named_parameters(recurse=False)).get("weight")
    return weight if weight is not None and weight.dim() == 2 else None


def _head(part: nn.Module, given: Tensor, made: Tensor) -> Head | None:
    """Return a layer as a head if that is what it computes."""
    matrix = _matrix(part)
    if matrix is None or given.dim() != 2:
        return None
    held = dict(part.named_parameters(recurse=False)).get("bias")
    for rows in (matrix.detach(), matrix.detach().T):
        if tuple(rows.shape) != (made.shape[1], given.shape[1]):
            continue
        bias = held.detach().double() if held is not None else rows.new_zeros(len(rows)).double()
        head = Head(rows.double().clone(), bias.clone())
        error = (head(given.double()) - made.double()).abs().max()
        if float(error) <= _SAME * float(made.abs().max().clamp(min=1e-30)):
            return head
    return None
