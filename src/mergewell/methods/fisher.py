"""Average the experts, each number as far as each expert's answers depend on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.gram import averaged, not_shares, shares
from mergewell.methods.base import MergeMethod, Needs, TensorGroup, needs_by


class Fisher(MergeMethod):
    """Average the experts, each number as far as each expert's answers depend on it.

    theta = sum_k c_k F_k theta_k / sum_k c_k F_k, with the diagonal F_k of expert k's Fisher
    information: its mean squared gradients on its own inputs, for answers drawn from itself. Needs
    `calibration: FILE` in the recipe, made with `mergewell calibrate --fisher classes`.

    Paper: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging",
    arXiv:2111.09832, equation 3.
    Departures: F_k is floored as in the released code (there at 1e-6, which larger models do not
    reach); where no expert's answers depend on a number the experts are averaged. The code can also
    divide each F_k by its norm, which is left out: coefficients do that.
    """

    paper: ClassVar[str] = "arXiv:2111.09832"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"floor": (1e-10, 1e-06)}
    needs: ClassVar[Needs] = needs_by(
        lambda method: (
            Needs(granularity="row", calibration=("fisher",)) if method.guided else Needs()
        )
    )

    floor: Annotated[float, Field(ge=0)] = 1e-10
    """Least Fisher information of a number; the larger, the nearer to the average."""

    guided: bool = True
    """Whether the calibration holds the Fisher information of this tensor; planning sets it."""

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method itself for a tensor with known gradients, else that which averages."""
        del name, shape
        return self if guided == self.guided else self.model_copy(update={"guided": guided})

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that are no shares."""
        return not_shares(coefficients)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the experts' average, weighted number by number."""
        mean = averaged(group)
        fisher = group.calibration.get("fisher")
        if fisher is None:
            return mean
        weights = [
            share * known.clamp(min=self.floor).to(mean.dtype)
            for share, known in zip(shares(group), fisher, strict=True)
        ]
        top, below = torch.zeros_like(mean), torch.zeros_like(mean)
        for weight, expert in zip(weights, group.experts, strict=True):
            top, below = top + weight * (expert - mean), below + weight
        return mean + torch.where(below > 0, top / torch.where(below > 0, below, 1.0), 0.0)
