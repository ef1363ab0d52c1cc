"""Ensemble: the mean of the experts' outputs, the reference that a merge is held against.

Three kinds, which differ and are therefore named in every result: the mean of the features (before
the head, as in the M-Loss paper, papers.md 1.5), of the logits, or of the probabilities.

Shapes: K experts, N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError, RecipeError
from mergewell.models.dataflow import Batch, call

EnsembleKind = Literal["features", "logits", "probabilities"]
"""What is averaged."""

TOLERANCE = 1e-4
"""How far the coefficients of an ensemble may sum from 1 (papers.md 1.2)."""


class Ensemble(nn.Module):
    """The experts' ensemble as a module: every expert is run and their outputs are averaged."""

    def __init__(
        self,
        experts: Sequence[nn.Module],
        *,
        kind: EnsembleKind,
        coefficients: Sequence[float] | None = None,
    ) -> None:
        """Make an ensemble of K experts; `coefficients` are 1/K each unless given.

        Raises:
            RecipeError: no experts, an unknown kind, or coefficients off the simplex.
        """
        super().__init__()
        self.kind: EnsembleKind = checked_kind(kind)
        self.coefficients = simplex(coefficients, len(experts))
        self.experts = nn.ModuleList(experts)

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean output for a batch; see `ensemble_outputs` for the three kinds."""
        outputs = [run_batch(expert, batch) for expert in self.experts]
        return ensemble_outputs(outputs, self.kind, coefficients=self.coefficients)

    def extra_repr(self) -> str:
        """Return what the module's repr shows: the kind and the coefficients."""
        return f"kind={self.kind!r}, coefficients={self.coefficients}"


def ensemble_outputs(
    outputs: Sequence[Tensor],
    kind: EnsembleKind,
    *,
    coefficients: Sequence[float] | None = None,
) -> Tensor:
    """Return the ensemble of K stored outputs of one shape, [N, ...] each.

    - "features": features in, their mean out; the head is still to be applied.
    - "logits": logits in, their mean out.
    - "probabilities": logits in, the *logarithm* of the mean of their softmaxes out, so that the
      result reads as logits like the other kinds.

    Equal outputs give that output back bitwise for features and logits.

    Raises:
        RecipeError: no outputs, an unknown kind, or coefficients off the simplex.
        ModelError: the outputs differ in shape.
    """
    shares = simplex(coefficients, len(outputs))
    shapes = sorted({tuple(output.shape) for output in outputs})
    if len(shapes) > 1:
        raise ModelError(
            f"The experts' outputs have different shapes ({', '.join(map(str, shapes))}), so they "
            "have no mean; use experts of one architecture."
        )
    if checked_kind(kind) == "probabilities":
        logs = torch.stack([output.log_softmax(-1) for output in outputs])
        column = logs.new_tensor(shares).log().reshape(-1, *[1] * outputs[0].dim())
        return torch.logsumexp(logs + column, dim=0)
    first, *others = outputs
    mean = first.clone()  # first + sum of shared differences: exact when all outputs are equal
    for share, output in zip(shares[1:], others, strict=True):
        mean += share * (output - first)
    return mean


def simplex(coefficients: Sequence[float] | None, experts: int) -> tuple[float, ...]:
    """Return the coefficients of an ensemble, checked, or 1/K each where none are given.

    Raises:
        RecipeError: no experts, not one coefficient an expert, a negative one, or a sum that is
            not 1 within `TOLERANCE`.
    """
    if experts == 0:
        raise RecipeError("An ensemble of no experts has no output; name at least one expert.")
    if coefficients is None:
        return (1.0 / experts,) * experts
    shares = tuple(float(coefficient) for coefficient in coefficients)
    if len(shares) != experts:
        raise RecipeError(
            f"The ensemble has {experts} experts but {len(shares)} coefficients; give one each."
        )
    if not all(share >= 0 for share in shares) or abs(sum(shares) - 1) > TOLERANCE:
        raise RecipeError(
            f"The ensemble's coefficients {list(shares)} must be 0 or more and sum to 1; "
            "divide them by their sum."
        )
    return shares


def run_batch(module: nn.Module, batch: Batch) -> Tensor:
    """Return a module's output for one batch, which must be a tensor.

    Raises:
        ModelError: the module returns something else.
    """
    output: object = call(module, batch)
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{type(module).__name__} returns {type(output).__name__} and not a tensor; wrap it in "
            "a module that returns its features or logits."
        )
    return output


def checked_kind(kind: EnsembleKind) -> EnsembleKind:
    """Return the kind of an ensemble as it is.

    Raises:
        RecipeError: there is no such kind.
    """
    if kind not in get_args(EnsembleKind):
        raise RecipeError(
            f"There is no ensemble of {kind!r}; known: {', '.join(get_args(EnsembleKind))}."
        )
    return kind
