"""Keep one model's tensor as it is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mergewell.errors import MethodError
from mergewell.methods.base import Laws, MergeMethod, TensorGroup


class Keep(MergeMethod):
    """Keep one model's tensor as it is; for rules such as `classifier.*`.

    theta = theta_m, m = 0 the base, 1 the first expert.

    Paper: none.
    Departures: none.
    """

    paper: ClassVar[str] = "none"
    laws: ClassVar[Laws] = Laws(
        order_free="one model is chosen by its place.",
    )

    model: int = 1
    """Which model: 0 is the base, 1 the first expert."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the chosen model's tensor."""
        if self.model == 0:
            return group.required_base
        if self.model > len(group.experts):
            raise MethodError(f"{group.name}: there is no expert {self.model}.")
        return group.experts[self.model - 1]
