"""L1 norms of task vectors, whole and after random drops.

Shapes: K experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mergewell.component import Fractions, for_each
from mergewell.statistics.base import State, WeightStatistic
from mergewell.statistics.ops import chunk_sums, row_sums, rows_of, total_of_rows
from mergewell.tensor_group import TensorGroup, Value

Favour = Literal["rank", "magnitude"]


def keep_probability(tau: Tensor, density: float, spread: float, favour: Favour) -> Tensor:
    """Return each entry's probability to be kept, from density - spread to density + spread.

    It rises along each row with the entry's rank by magnitude (equal ones by position), or with
    the magnitude itself; a row of equal magnitudes, by magnitude, keeps all with `density`.
    """
    rows = rows_of(tau).abs()
    if favour == "rank":
        place = rows.sort(dim=1, stable=True).indices
        numbers = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device)
        rank = torch.zeros_like(rows).scatter_(1, place, numbers.expand_as(rows).contiguous())
        share = rank / (rows.shape[1] - 1) if rows.shape[1] > 1 else torch.full_like(rank, 0.5)
    elif rows.numel() == 0:
        share = rows
    else:
        least = rows.amin(1, keepdim=True)
        width = rows.amax(1, keepdim=True) - least
        flat = width == 0
        share = torch.where(flat, 0.5, (rows - least) / torch.where(flat, 1.0, width))
    return ((density - spread) + share * (2 * spread)).reshape(tau.shape)


class KeptNorm(WeightStatistic):
    """The L1 norm of each task vector, and of the entries that a random drop would keep."""

    density: Fractions
    """Probability with which an entry is kept."""

    spread: float | tuple[float, ...] | None = None
    """None where all entries share one probability; else half its range along a row."""

    favour: Favour = "rank"
    """What the probability rises with, where there is a spread."""

    def keep(self, group: TensorGroup, expert: int) -> Tensor:
        """Return where this expert's entries are kept in this block, drawn by `group.uniform`."""
        density = for_each(self.density, len(group.experts))[expert]
        return group.uniform(expert) < self.probability(group, expert, density)

    def probability(self, group: TensorGroup, expert: int, density: float) -> Tensor | float:
        """Return the probability to be kept: of each entry, or one for all."""
        if self.spread is None or density == 1.0:
            return density
        spread = for_each(self.spread, len(group.experts))[expert]
        return keep_probability(group.task_vectors[expert], density, spread, self.favour)

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return this block's sums, by chunk or, where probabilities go by rows, by row."""
        del done, index
        sizes = [tau.abs() for tau in group.task_vectors]
        kept = [torch.where(self.keep(group, k), size, 0.0) for k, size in enumerate(sizes)]
        if self.spread is not None:
            return row_sums(group, [*sizes, *kept])
        return {f"{group.name}:sums": chunk_sums(group, [*sizes, *kept])}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `whole` and `kept`, [K] each, float64."""
        del numel
        by_rows = self.spread is not None
        sums = total_of_rows(done, name) if by_rows else done[f"{name}:sums"].sum(0)
        whole, kept = sums.chunk(2)
        return {"whole": whole, "kept": kept}
