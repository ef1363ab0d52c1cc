"""Keep, entry by entry, the largest change of any expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup


class Magmax(MergeMethod):
    """Keep, entry by entry, the largest change of any expert.

    theta = theta_0 + scale c_j tau_j, j = argmax_k |c_k tau_k| for each entry.

    Paper: Marczak et al. 2024, "MagMax", arXiv:2407.06322, section 4.
    Departures: of equal magnitudes the first expert's is kept. Coefficients multiply the task
    vectors before they are compared.
    """

    paper: ClassVar[str] = "arXiv:2407.06322"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6)
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(neutral={"scale": 1.0})

    scale: float = 0.5
    """Factor on the merged task vector."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled largest changes."""
        scaled = [c * tau for c, tau in zip(group.coefficients, group.task_vectors, strict=True)]
        largest = scaled[0]
        for tau in scaled[1:]:
            largest = torch.where(tau.abs() > largest.abs(), tau, largest)
        return group.required_base + self.scale * largest
