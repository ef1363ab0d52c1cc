"""M-Loss: how far the activation of merged pre-activations is from the experts' mean activation.

Shapes: K experts, N samples, O nodes; any further dimensions are positions (tokens, pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.errors import DataError, RecipeError
from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value

TOLERANCE = 1e-4
"""How far coefficients may sum from 1 (papers.md 1.2.3)."""

BLOCK = 32_767
"""Elements handled at a time: they stay in the cache, and torch starts no threads for so few."""


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """One batch of pre-activations of every expert at one layer."""

    pre_activations: Sequence[Tensor]
    """K tensors z_j of one shape [N, ...] with the nodes along `node_dim`."""

    coefficients: Sequence[float]
    """K coefficients on the simplex: 0 or more, sum 1."""

    activation: Callable[[Tensor], Tensor]
    """The pointwise function that follows the layer."""

    node_dim: int
    """The dimension of one pre-activation tensor that counts the nodes."""

    merged: Tensor | None = None
    """Merged pre-activation, where it is not the experts' mean (mode `own`)."""

    keep: Tensor | None = None
    """Observations that count, boolean, the shape of a pre-activation without nodes."""


class MLoss(Statistic[ActivationBatch]):
    """Mean squared gap between the experts' mean activation and that of the merged layer.

    gap = sum_j c_j f(z_j) - f(sum_j c_j z_j). Source: papers.md 1.2.2 (node), 1.2.3 (layer).
    Departures: sums run over all observations, not the mean of batch means; both means are written
    z_0 + sum_j c_j (z_j - z_0), so that equal experts have a gap of exactly 0, in float64.
    """

    def update(self, state: State, batch: ActivationBatch) -> State:
        """Return the state with one more batch.

        Raises:
            RecipeError: the coefficients are not one an expert on the simplex.
            DataError: the tensors of the batch differ in shape or do not begin with samples.
        """
        coefficients = _simplex(batch.coefficients, len(batch.pre_activations))
        _check_shapes(batch)
        experts = [_by_node(z, batch.node_dim) for z in batch.pre_activations]
        merged = None if batch.merged is None else _by_node(batch.merged, batch.node_dim)
        first = experts[0]
        samples, before, nodes, after = first.shape
        keep = None if batch.keep is None else batch.keep.bool().reshape(samples, before, 1, after)
        sums = torch.zeros(3, samples, nodes, dtype=torch.float64, device=first.device)
        for rows, columns in _blocks(first):
            # [n, before, o, after], in float64, the nodes where the layer has them
            z = [part[rows, :, columns].to(torch.float64) for part in experts]
            ensemble = _mean([batch.activation(part) for part in z], coefficients)
            other = _mean(z, coefficients) if merged is None else merged[rows, :, columns]
            gap = ensemble - batch.activation(other.to(torch.float64))
            if keep is not None:
                gap = gap.masked_fill(~keep[rows], 0.0)
                ensemble = ensemble.masked_fill(~keep[rows], 0.0)
            for index, part in enumerate((gap, gap * gap, ensemble * ensemble)):
                sums[index, rows, columns] = part.sum((1, 3))
        counts = torch.full((samples,), before * after) if keep is None else keep.sum((1, 2, 3))
        gaps, squares, energies = sums
        added = {
            "gap": gaps.sum(0),
            "gap_squared": squares.sum(0),
            "ensemble_squared": energies.sum(0),
            "gap_norm": squares.sum(1).sqrt().sum(),
            "observations": counts.sum(),
            "samples": (counts > 0).sum(),
        }
        return self.join(state, {key: part.to(torch.float64).cpu() for key, part in added.items()})

    def value(self, state: State) -> Value:
        """Return the finished value, in float64, always finite for finite inputs.

        - `node` [O]: mean squared gap over all observations, the node M-Loss
        - `mean_gap` [O]: mean gap, with its sign
        - `energy` [O]: mean squared activation of the ensemble
        - `absolute` []: mean over samples of the norm of a sample's gap, all positions and nodes
        - `relative` []: sqrt(sum gap^2 / sum ensemble^2). An ensemble that is 0 throughout gives
          0 without a gap and else 1, the same ratio with the merged activation below the line.

        Raises:
            DataError: no observation was counted.
        """
        if not state or float(state["observations"]) == 0:
            raise DataError(
                "M-Loss of no observations is not defined; give at least one sample that is not "
                "all padding."
            )
        observations, samples = state["observations"], state["samples"]
        gap, energy = state["gap_squared"].sum(), state["ensemble_squared"].sum()
        return {
            "node": state["gap_squared"] / observations,
            "mean_gap": state["gap"] / observations,
            "energy": state["ensemble_squared"] / observations,
            "absolute": state["gap_norm"] / samples,
            "relative": (gap / energy).sqrt() if energy > 0 else (gap > 0).to(torch.float64),
        }


def _simplex(coefficients: Sequence[float], experts: int) -> list[float]:
    shares = [float(share) for share in coefficients]
    if len(shares) != experts or not experts:
        raise RecipeError(
            f"M-Loss was given {experts} experts and {len(shares)} coefficients; give one each."
        )
    if not all(share >= 0 for share in shares) or not abs(sum(shares) - 1) <= TOLERANCE:
        raise RecipeError(
            f"M-Loss coefficients {shares} must be 0 or more and sum to 1; divide them by "
            "their sum."
        )
    return shares


def _check_shapes(batch: ActivationBatch) -> None:
    first = batch.pre_activations[0]
    others = [*batch.pre_activations[1:], *([] if batch.merged is None else [batch.merged])]
    shapes = {tuple(z.shape) for z in (first, *others)}
    if len(shapes) > 1:
        raise DataError(
            f"M-Loss was given pre-activations of shapes {sorted(shapes)}; they must be equal."
        )
    if first.ndim < 2 or batch.node_dim % first.ndim == 0:
        raise DataError(
            f"M-Loss was given pre-activations of shape {tuple(first.shape)} with the nodes along "
            f"dimension {batch.node_dim}; the first dimension must count samples."
        )
    if batch.keep is not None and batch.keep.shape != first.movedim(batch.node_dim, -1).shape[:-1]:
        raise DataError(
            f"M-Loss was given a mask of shape {tuple(batch.keep.shape)} for pre-activations of "
            f"shape {tuple(first.shape)}; it must be that shape without the nodes."
        )


def _by_node(z: Tensor, node_dim: int) -> Tensor:
    """Return z as [N, before, O, after], the positions gathered on both sides of the nodes."""
    dim = node_dim % z.ndim
    samples, before, after = z.shape[0], z.shape[1:dim].numel(), z.shape[dim + 1 :].numel()
    return z.reshape(samples, before, z.shape[dim], after)


def _blocks(z: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut samples and nodes into blocks that stay in the cache; one block on other devices."""
    samples, before, nodes, after = z.shape
    size = BLOCK if z.device.type == "cpu" else max(1, z.numel())
    positions = max(1, before * after)
    width = max(1, min(nodes, size // positions))
    height = max(1, size // (positions * width))
    for row in range(0, samples, height):
        for column in range(0, nodes, width):
            yield slice(row, row + height), slice(column, column + width)


def _mean(values: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    first, *others = values
    mean = first.clone()
    for share, other in zip(coefficients[1:], others, strict=True):
        mean += share * (other - first)
    return mean
