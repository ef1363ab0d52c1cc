"""Add up what one expert alone changed, average what several changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.overlap import Overlap, changed


class Ram(MergeMethod):
    """Add up what one expert alone changed, average what several changed (RAM and RAM+).

    theta = theta_0 + sum_k c_k f_k tau_k / n, n experts changed the entry; f_k = 1 unless n = 1.

    An entry counts as changed where |tau| > epsilon. RAM+ multiplies an expert's own entries by
    1 + r * min(alpha, shared / own), the ratio of how many of its entries are shared and its own.

    Paper: "Reinforced Agent Merging", arXiv:2601.13572, section 3.
    Departures: read in mergekit's code; where an expert has no entry of its own the ratio is that
    to one entry. Coefficients multiply the task vectors.
    mergekit's ram: the defaults; ramplus_tl: plus=true with its r, alpha and epsilon.
    """

    paper: ClassVar[str] = "arXiv:2601.13572"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"plus": (False, True)}
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(
        scale="epsilon is an absolute magnitude.",
        neutral={"epsilon": 0.0, "plus": False},
    )

    epsilon: Annotated[float, Field(ge=0)] = 1e-5
    """Magnitude above which an entry counts as changed, in units of the weights."""

    plus: bool = False
    """Strengthen what is an expert's own (RAM+)."""

    r: float = 0.1
    """RAM+: how much of the ratio is added."""

    alpha: Annotated[float, Field(ge=0)] = 0.2
    """RAM+: the largest ratio that counts."""

    scope: Literal["tensor", "model"] = "tensor"
    """RAM+: count shared and own entries of each tensor (mergekit), or of the whole model."""

    def statistics(self) -> Sequence[Overlap]:
        """Return the counts of shared and own entries, where they matter."""
        return (Overlap(epsilon=self.epsilon, scope=self.scope),) if self.plus else ()

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the own and the averaged shared changes."""
        masks, count = changed(group.task_vectors, self.epsilon)
        factors = self._factors(group)
        merged = torch.zeros_like(group.required_base)
        for k, (tau, mask) in enumerate(zip(group.task_vectors, masks, strict=True)):
            part = torch.where(count == 1, factors[k] * tau, tau / count.clamp(min=1))
            merged = merged + group.coefficients[k] * torch.where(mask, part, 0.0)
        return group.required_base + merged

    def _factors(self, group: TensorGroup) -> Tensor:
        if not self.plus:
            return torch.ones_like(group.coefficients)
        counts = group.statistic(self.statistics()[0])
        ratio = counts["shared"].to(torch.float64) / counts["own"].clamp(min=1)
        return (1 + self.r * ratio.clamp(max=self.alpha)).to(group.coefficients.dtype)
