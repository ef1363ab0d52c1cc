"""Scale the directions of another method's result down where overcounted (SVC)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.matrices import RefinedMerge, TaskMatrices
from mergewell.methods.base import Laws, TensorGroup


class Svc(RefinedMerge):
    """Scale the directions of another method's result down where overcounted (SVC).

    The result of `of`, less the base, is sum_r s_r u_r v_r'. Of direction r it holds
    t_k = <u_r' D, u_r' D_k> / ||u_r' D_k||^2 times what expert k has, D_k = c_k (theta_k -
    theta_0), and s_r is multiplied by K / sum_k max(floor, t_k). So `of`'s own scale matters only
    where the floor is reached.

    Paper: Li et al. 2026, "When shared knowledge hurts" (SVC), arXiv:2602.05536, and its code.
    Departures: vectors are treated in the same way, as one direction, with the floor. An expert
    that has nothing of a direction counts with the floor.
    """

    paper: ClassVar[str] = "arXiv:2602.05536"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "of": ({"name": "task_arithmetic", "scale": 0.3}, {"name": "tsv"}),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(neutral={"of": {"name": "task_arithmetic", "scale": 1.0}})

    floor: Annotated[float, Field(gt=0)] | None = None
    """Least t of an expert, so that no direction grows beyond measure; 1 / K unless given. Others
    use 0.1 for most methods, 0.2 for iso_cts, and 1, which never amplifies, for tsv and wudi."""

    def refine(self, merged: Tensor, matrices: TaskMatrices) -> Tensor:
        """Return the merged task matrix with calibrated singular values."""
        factors = self.factors(merged)
        floor = self._floor(len(matrices))
        counted = torch.zeros_like(factors.values)
        for matrix in matrices:
            parts = factors.left.T @ matrix
            counted = counted + _ratio(
                factors.values * (parts * factors.right.T).sum(1), parts.square().sum(1)
            ).clamp(min=floor)
        return factors.matrix(factors.values * (len(matrices) / counted))

    def refine_vector(self, merged: Tensor, group: TensorGroup) -> Tensor:
        """Return the merged task vector times K / sum_k max(floor, t_k)."""
        floor = self._floor(len(group.experts))
        counted = torch.zeros_like(group.coefficients[0])
        for coefficient, tau in zip(group.coefficients, group.task_vectors, strict=True):
            own = coefficient * tau
            counted = counted + _ratio((merged * own).sum(), own.square().sum()).clamp(min=floor)
        return merged * (len(group.experts) / counted)

    def _floor(self, count: int) -> float:
        return 1 / count if self.floor is None else self.floor


def _ratio(products: Tensor, squares: Tensor) -> Tensor:
    none = squares == 0
    return torch.where(none, 0.0, products / torch.where(none, 1.0, squares))
