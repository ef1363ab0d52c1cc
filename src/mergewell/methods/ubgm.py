"""Add task vectors so that the gradients of all tasks stay matched, by their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup, needs_by


class Ubgm(MergeMethod):
    """Add task vectors so that the gradients of all tasks stay matched, by their uncertainty.

    theta = theta_0 + scale sum_k c_k (H_0 + H_k) tau_k / (H_0 + scale sum_k c_k H_k), number by
    number, with the Fisher information H of the base and of each expert, summed over samples, and
    the prior's precision added to H_0. A negative coefficient removes a task. Needs `calibration:
    FILE` in the recipe, made with `mergewell calibrate --fisher classes`.

    Paper: Daheim et al. 2024, "Model merging by uncertainty-based gradient matching",
    arXiv:2310.12808, equation 12.
    Departures: H_0 is made on the calibration's inputs, not on what the base was trained on, and
    `base_samples` says of how many inputs it is to be the sum. Tensors whose gradients are not
    known get H_k = 0: task arithmetic.
    """

    paper: ClassVar[str] = "arXiv:2310.12808"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6)
    }
    needs: ClassVar[Needs] = needs_by(
        lambda method: (
            Needs(base=True, granularity="row", calibration=("fisher",))
            if method.guided
            else Needs(base=True)
        )
    )
    laws: ClassVar[Laws] = Laws(
        equal_experts="K equal task vectors add up to K times one where no gradient is known.",
    )

    scale: float = 1.0
    """Factor on every coefficient (alpha)."""

    prior: Annotated[float, Field(gt=0)] = 1e-12
    """Precision of the base's prior, added to its Fisher information."""

    base_samples: Annotated[float, Field(ge=0)] | None = None
    """Samples that the base's Fisher information stands for; those it was made on if absent."""

    guided: bool = True
    """Whether the calibration holds the Fisher information of this tensor; planning sets it."""

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method itself for a tensor with known gradients, else task arithmetic."""
        del name, shape
        return self if guided == self.guided else self.model_copy(update={"guided": guided})

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the task vectors, each weighed by its own uncertainty."""
        base = group.required_base
        dtype = torch.float64
        factors = self.scale * group.coefficients.to(dtype)
        known = group.calibration.get("fisher")
        if known is None:
            own = torch.zeros(len(factors), *[1] * base.dim(), dtype=dtype, device=base.device)
            start = torch.ones([1] * base.dim(), dtype=dtype, device=base.device)
        else:
            counts = group.calibration["fisher_samples"]
            standing = counts[0] if self.base_samples is None else self.base_samples
            start = group.calibration["fisher_base"] * standing + self.prior
            own = known * counts[1:].view(-1, *[1] * base.dim())
        top, below = torch.zeros_like(base, dtype=dtype), start
        for factor, curvature, tau in zip(factors, own, group.task_vectors, strict=True):
            top = top + factor * (start + curvature) * tau
            below = below + factor * curvature
        # removing a task may leave a number without any curvature of its own
        step = top / below.clamp(min=self.prior)
        return base + step.to(base.dtype)
