"""M-Loss: how far what merged pre-activations give is from the mean of what the experts' give.

Shapes: K experts, N samples, O nodes; any further dimensions are positions (tokens, pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.errors import DataError, RecipeError
from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value

TOLERANCE = 1e-4
"""How far coefficients may sum from 1 (papers.md 1.2.3)."""

BLOCK = 131_072
"""Elements handled at a time: what is made of them stays in the cache."""

PLENTY = 256
"""Observations in a batch from which float32 is enough, if the gap is not small."""

SMALL = 2e-4
"""Gap, as a fraction of the ensemble, below which a block is computed in float64.

Activations in float32 are wrong by less than 1e-6 of the ensemble, so the relative M-Loss of a
layer is right to (1e-6 / 2e-4)^2 / 2 = 1e-5; on the text experts, with gaps of 3e-4 to 5e-4, to
3e-6. Nodes were right to 7e-6 in the median; the rounding of float32 pre-activations, which no
arithmetic after them mends, moves nodes by 3e-5.
"""

SPARSE = 4
"""Of so many blocks of rows one is used for the moments, the first of all included."""

Factors = tuple[Tensor, ...]
"""The branches of a gated unit: the gate's pre-activation, and what its function multiplies."""


def identity(output: Tensor) -> Tensor:
    """Return a module's output as it is: the "activation" of units that are whole modules."""
    return output


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """One batch of pre-activations of every expert at one unit."""

    pre_activations: Sequence[Tensor | Factors]
    """K tensors z_j of one shape [N, ...] with the nodes along `node_dim`, or K tuples of such."""

    coefficients: Sequence[float]
    """K coefficients on the simplex: 0 or more, sum 1."""

    activation: Callable[..., Tensor]
    """The pointwise function that follows: of one tensor, or of as many as a tuple has."""

    node_dim: int
    """The dimension of one pre-activation tensor that counts the nodes."""

    merged: Tensor | Factors | None = None
    """Merged pre-activation, where it is not the experts' mean."""

    keep: Tensor | None = None
    """Observations that count, boolean, the shape of a pre-activation without nodes."""

    sample_of: Tensor | None = None
    """The number of the sample of each entry of dimension 0, where these are not samples, int64."""


class MLoss(Statistic[ActivationBatch]):
    """Mean squared gap between the experts' mean activation and that of the merged layer.

    gap = sum_j c_j f(z_j) - f(sum_j c_j z_j). Source: papers.md 1.2.2 (node), 1.2.3 (layer).
    Departures: sums run over all observations, not the mean of batch means; both means are written
    z_0 + sum_j c_j (z_j - z_0), so that equal experts have a gap of exactly 0. Batches in float64,
    small ones and small gaps are computed in float64, the others in float32; sums are in float64.
    """

    moments: bool = True
    """Whether sums and products of the pre-activations are gathered, for the expected M-Loss.

    Of batches of many blocks one block in `SPARSE` is used: K (K + 3) / 2 sums cost as much as all
    the rest.
    """

    def update(self, state: State, batch: ActivationBatch) -> State:
        """Return the state with one more batch.

        Raises:
            RecipeError: the coefficients are not one an expert on the simplex.
            DataError: the tensors of the batch differ in shape or do not begin with samples.
        """
        shares = _simplex(batch.coefficients, len(batch.pre_activations))
        _check_shapes(batch)
        experts = [_factors(z) for z in batch.pre_activations]
        first = experts[0][0]
        masked = batch.keep is not None
        sides = [[_rows(z, batch.node_dim, masked) for z in side] for side in experts]
        merged: list[Tensor] | None = None
        if batch.merged is not None:
            merged = [_rows(z, batch.node_dim, masked) for z in _factors(batch.merged)]
        rows, nodes, after = sides[0][0].shape
        before = max(1, rows // max(1, first.shape[0]))
        kept = None if batch.keep is None else batch.keep.reshape(-1).bool().nonzero()[:, 0]
        kept = None if kept is not None and len(kept) == rows else kept
        sample_of = torch.arange(rows, device=first.device) // before
        samples = first.shape[0]
        if batch.sample_of is not None:
            sample_of = batch.sample_of[sample_of]
            samples = int(sample_of.max()) + 1 if rows else 0
        sums = _Sums(samples, nodes, first.device)
        table = _Moments(sides, nodes) if self.moments and merged is None else None
        plenty = first.dtype != torch.float64 and rows * after >= PLENTY
        for index, picked, columns in _blocks(sides[0][0], kept):

            def cut(
                part: Tensor,
                dtype: torch.dtype,
                picked: slice | Tensor = picked,
                columns: slice = columns,
            ) -> Tensor:
                return part[picked][:, columns].to(dtype)

            def made(dtype: torch.dtype, cut: Callable[..., Tensor] = cut) -> _Block:
                z = [[cut(part, dtype) for part in side] for side in sides]
                other = None if merged is None else [cut(part, dtype) for part in merged]
                return _Block(z, other, shares, batch.activation)

            block = made(torch.float32) if plenty else None
            if block is None or not block.is_trusted():
                block, plenty = made(torch.float64), False  # the next blocks are alike
            sums.add(block, sample_of[picked], columns)
            if table is not None and index % SPARSE == 0:
                table.add(block.basis(), columns)
        counts = torch.bincount(sample_of if kept is None else sample_of[kept], minlength=samples)
        added = {**sums.state(), "observations": counts.sum() * after}
        added["samples"] = (counts > 0).sum()
        if table is not None:
            added |= table.state(torch.tensor(shares, dtype=torch.float64))
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


class _Block:
    """Gap and ensemble of one block, [R, o, A] each."""

    def __init__(
        self,
        experts: Sequence[Sequence[Tensor]],
        merged: Sequence[Tensor] | None,
        shares: Sequence[float],
        activation: Callable[..., Tensor],
    ) -> None:
        self._experts = experts
        outputs = (activation(*side) for side in experts)
        self.ensemble = _mean(outputs, shares)
        if merged is None:
            merged = [_mean(iter(sides), shares) for sides in zip(*experts, strict=True)]
        self.gap = self.ensemble - activation(*merged)

    def basis(self) -> list[Tensor]:
        """Return, of each factor, z_0 and the differences z_j - z_0."""
        factors = zip(*self._experts, strict=True)
        return [z if j == 0 else z - sides[0] for sides in factors for j, z in enumerate(sides)]

    def is_trusted(self) -> bool:
        """Return whether the gap stands well above the rounding errors of float32."""
        gap, ensemble = self.gap.flatten(), self.ensemble.flatten()
        found, wanted = float(gap @ gap), SMALL**2 * float(ensemble @ ensemble)
        return found >= wanted and found > 0


class _Sums:
    """Sums of gaps, their squares and the ensemble's squares, in float64."""

    def __init__(self, samples: int, nodes: int, device: torch.device) -> None:
        self._nodes = torch.zeros(3, nodes, dtype=torch.float64, device=device)
        self._samples = torch.zeros(samples, dtype=torch.float64, device=device)

    def add(self, block: _Block, sample_of: Tensor, columns: slice) -> None:
        squared = block.gap * block.gap
        parts = (block.gap, squared, block.ensemble * block.ensemble)
        self._nodes[:, columns] += _over_rows(parts)
        if squared.shape[2] > 1:
            squared = squared.sum(2, keepdim=True)
        of_rows = (squared[:, :, 0] @ squared.new_ones(squared.shape[1])).to(torch.float64)
        self._samples.index_add_(0, sample_of, of_rows)

    def state(self) -> dict[str, Tensor]:
        gap, squared, energy = self._nodes
        return {
            "gap": gap,
            "gap_squared": squared,
            "ensemble_squared": energy,
            "gap_norm": self._samples.sqrt().sum(),
        }


class _Moments:
    """Sums of z_0 and of the differences to it, and of their products, per node, in float64.

    Differences, so that the spread between nearly equal experts survives the rounding.
    """

    def __init__(self, sides: Sequence[Sequence[Tensor]], nodes: int) -> None:
        experts, factors = len(sides), len(sides[0])
        self._pairs = moment_pairs(experts, factors)
        self._sums = torch.zeros(
            experts * factors, nodes, dtype=torch.float64, device=sides[0][0].device
        )
        self._products = self._sums.new_zeros(len(self._pairs), nodes)
        self._observations = 0

    def add(self, basis: Sequence[Tensor], columns: slice) -> None:
        if columns.start == 0:
            self._observations += basis[0].shape[0] * basis[0].shape[2]
        self._sums[:, columns] += _over_rows(basis)
        self._products[:, columns] += _over_rows(basis[i] * basis[j] for i, j in self._pairs)

    def state(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return the sums; the coefficients times the observations, so that these add up too."""
        table = {"sum": self._sums, "product": self._products}
        return table | {"coefficients": coefficients * self._observations}


def moment_pairs(experts: int, factors: int) -> list[tuple[int, int]]:
    """Return which variables' products are gathered: all of the first factor, and across.

    Variables 0 .. K-1 are z_0 and the differences z_j - z_0; K .. 2K-1 the same of the second.
    """
    own = [(i, j) for i in range(experts) for j in range(i, experts)]
    across = [(i, experts * f + j) for f in range(1, factors) for i, j in _square(experts)]
    return own + across


def _square(size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(size) for j in range(size)]


def _mean(values: Iterator[Tensor], shares: Sequence[float]) -> Tensor:
    """Return x_0 + sum_j c_j (x_j - x_0); few values are held at a time, to stay in the cache."""
    first = next(values)
    mean, difference = first, None
    for share, value in zip(shares[1:], values, strict=True):
        difference = torch.sub(value, first, out=difference)
        mean = (
            first.add(difference, alpha=share)
            if mean is first
            else mean.add_(difference, alpha=share)
        )
    return mean


def _over_rows(parts: Iterable[Tensor]) -> Tensor:
    """Return each part's sums over rows and positions behind the nodes, [R, o, A] to [o]."""
    sums: list[Tensor] = []
    ones: Tensor | None = None
    for part in parts:
        if part.shape[2] > 1:
            sums.append(part.sum(2).sum(0, dtype=torch.float64))
            continue
        ones = part.new_ones(len(part)) if ones is None else ones
        sums.append(ones @ part[:, :, 0])
    return torch.stack(sums).to(torch.float64)


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


def _factors(z: Tensor | Factors) -> Factors:
    return z if isinstance(z, tuple) else (z,)


def _check_shapes(batch: ActivationBatch) -> None:
    sides = [*batch.pre_activations, *([] if batch.merged is None else [batch.merged])]
    shapes = {tuple(z.shape) for side in sides for z in _factors(side)}
    first = _factors(batch.pre_activations[0])[0]
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


def _rows(z: Tensor, node_dim: int, masked: bool) -> Tensor:
    """Return z as [R, O, A]: samples and positions before the nodes, nodes, positions after.

    With a mask all positions are made rows, so that those that do not count can be left out.
    """
    dim = node_dim % z.ndim
    if masked and dim < z.ndim - 1:
        z, dim = z.movedim(dim, -1), z.ndim - 1
    return z.reshape(z.shape[:dim].numel(), z.shape[dim], z.shape[dim + 1 :].numel())


def _blocks(z: Tensor, kept: Tensor | None) -> Iterator[tuple[int, slice | Tensor, slice]]:
    """Cut rows and nodes into blocks that stay in the cache; one block on other devices.

    Yields the number of the block of rows, these rows, and the nodes.
    """
    rows, nodes, after = z.shape
    rows = rows if kept is None else len(kept)
    size = BLOCK if z.device.type == "cpu" else max(1, z.numel())
    width = max(1, min(nodes, size // max(1, after)))
    height = max(1, size // max(1, after * width))
    for index, row in enumerate(range(0, rows, height)):
        picked = slice(row, row + height)
        for column in range(0, nodes, width):
            wanted = picked if kept is None else kept[picked]
            yield index, wanted, slice(column, column + width)
