"""Give each expert entries of its own: the largest few of every group that are still free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.ops import rows_of


class Cabs(MergeMethod):
    """Give each expert entries of its own: the n largest of every m that are still free.

    theta = theta_0 + scale sum_k c_k m_k tau_k, the masks m_1, m_2, ... without a common entry.

    In the order of the experts: of every m entries in a row the n largest changes are kept, and
    they are taken from the experts that follow; then the changes are added up.

    Paper: Yang et al. 2025, "CABS", arXiv:2503.01874, section 4 (conflict-aware n:m pruning).
    Departures: groups are counted in each row, in the authors' code over the flattened tensor,
    which is the same where m divides the row's length. Of a shorter group at the end of a row
    the n largest are kept as well (`remainder="drop"` drops it, as the authors' code does). Ties
    from the front.
    """

    paper: ClassVar[str] = "arXiv:2503.01874"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "n": (32, 64, 128),
        "scale": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    }
    needs: ClassVar[Needs] = Needs(base=True, granularity="row")
    laws: ClassVar[Laws] = Laws(
        order_free="the first expert chooses first.",
        neutral={"n": 1, "m": 1, "scale": 1.0, "remainder": "keep"},
    )

    n: Annotated[int, Field(ge=1)] = 64
    """How many entries of a group each expert keeps."""

    m: Annotated[int, Field(ge=1)] = 256
    """Entries in a group."""

    remainder: Literal["keep", "drop"] = "keep"
    """What becomes of a shorter group at the end of a row."""

    scale: float = 1.0
    """Factor on the sum of the kept changes."""

    @model_validator(mode="after")
    def _n_is_part_of_m(self) -> Self:
        if self.n > self.m:
            raise ValueError(f"n = {self.n} of m = {self.m} entries cannot be kept; lower n")
        return self

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled sum of the changes kept without overlap."""
        shape = group.required_base.shape
        free = torch.ones_like(rows_of(group.required_base), dtype=torch.bool)
        kept: list[Tensor] = []
        for tau in group.task_vectors:
            rows = torch.where(free, rows_of(tau), 0.0)
            mask = self._largest(rows) & free
            kept.append(torch.where(mask, rows, 0.0).reshape(shape))
            free = free & ~mask
        summed = ops.weighted_sum(group.coefficients, kept)
        return group.required_base + self.scale * summed

    def _largest(self, rows: Tensor) -> Tensor:
        """Return a mask of the n largest entries of every group of m, [rows, length]."""
        count, length = rows.shape
        full = length // self.m * self.m
        groups = rows[:, :full].reshape(-1, self.m)
        mask = (ops.ranks_in_rows(groups) < self.n).view(count, full)
        rest = ops.ranks_in_rows(rows[:, full:]) < (self.n if self.remainder == "keep" else 0)
        return torch.cat([mask, rest], dim=1)
