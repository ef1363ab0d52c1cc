"""Elect signs in a basis that covers all experts' leading directions (DC-Merge)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from mergewell.linalg import Factors
from mergewell.matrices import TaskMatrices, TruncatedMerge, mean_of_agreeing, trimmed
from mergewell.methods.base import Fraction, Laws


class DcMerge(TruncatedMerge):
    """Elect signs in a basis that covers all experts' leading directions (DC-Merge).

    With U = polar([U_1 .. U_K]) and V likewise, of the r / K longest directions of each expert,
    M_k = U' U_k S_k V_k' V is cut to its largest entries, a sign is elected for each entry, and
    those that agree are averaged (TIES). Delta = U (M on the blocks of the same expert) V'.

    Paper: "DC-Merge", arXiv:2603.06242 (CVPR 2026), read in its code.
    Departures: the code keeps 0.001 of the entries for full fine-tunes and names 0.1 as its
    default, which is ours. How singular values are smoothed (for LoRA) is our reading: to their
    mean, or to a straight line from the first to the last with `ratio` between them, their sum
    kept. Coefficients multiply the task matrices before all else.
    """

    paper: ClassVar[str] = "arXiv:2603.06242"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "keep": (0.1, 0.3),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        single_expert="Few entries are kept, those of one expert in its own basis by chance.",
        equal_experts="The shared directions are spread over the experts' blocks.",
    )

    density: Fraction | None = None
    """Share of the directions of each expert that is kept; 1 / K unless given."""

    keep: Fraction = 0.1
    """Share of the entries of each expert's matrix in the common basis that is kept."""

    smooth: Literal["none", "average", "linear"] = "none"
    """Make the singular values that are kept equal, or fall along a line (for LoRA)."""

    ratio: Annotated[float, Field(ge=1)] = 5.0
    """First to last singular value where they fall along a line."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return what the experts agree on in the common basis, each in its own block."""
        share = 1 / len(matrices) if self.density is None else self.density
        rank = max(1, int(matrices.rank * share + 1e-9))
        tops = [self.leading(matrices, k, rank) for k in range(len(matrices))]
        left = self.polar(torch.cat([top.left for top in tops], dim=1))
        right = self.polar(torch.cat([top.right for top in tops], dim=1))
        cores = [(left.T @ top.left * self._smoothed(top)) @ (top.right.T @ right) for top in tops]
        if not cores[0].numel():
            return left @ right.T
        merged = mean_of_agreeing([trimmed(core, self.keep) for core in cores])
        blocks = [torch.ones(len(top.values), len(top.values)).to(merged) for top in tops]
        own = cast("Tensor", torch.block_diag(*blocks))
        return left @ (merged * own) @ right.T

    def _smoothed(self, top: Factors) -> Tensor:
        values = top.values
        if self.smooth == "none" or not len(values):
            return values
        ends = (1.0, 1.0) if self.smooth == "average" else (self.ratio, 1.0)
        line = torch.linspace(*ends, len(values)).to(values)
        return line * (values.sum() / line.sum())
