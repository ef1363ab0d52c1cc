"""DARE with rows trimmed by their M-Loss where a calibration measured them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, TensorGroup


class MDare(ops.GuidedMerge):
    """DARE with rows trimmed by their M-Loss where a calibration measured them.

    As `dare`; in a row of M-Loss L, m_k = 1 for the largest d(L) of its entries.

    Weights whose nodes were measured keep the largest entries of each row, as `m_ties` does; of
    all other tensors entries are dropped at random. Then a sign is elected and what agrees is
    averaged. Needs `calibration: FILE` in the recipe.

    Paper: Wang et al. 2026, "M-Loss", arXiv:2602.08564; details from its released code, which
    leaves trimmed rows as they are and divides the other tensors by the density
    (`rescale="mixed"`).
    Departures: as `m_ties` and `dare`; "density" divides trimmed rows by their density as well.
    """

    paper: ClassVar[str] = "arXiv:2602.08564"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.2, 0.5, 0.8),
        "spread": (0.1, 0.2),
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4),
    }
    laws: ClassVar[Laws] = Laws(
        order_free="each expert's mask is drawn by its place in the recipe.",
        neutral={**ops.NEUTRAL_SPARSE, "elect": "mass", "spread": 0.0},
    )

    rescale: Literal["mixed", "density", "none"] = "mixed"
    """Divide by the density what was drawn at random (paper), guided rows as well, or nothing."""

    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors trimmed by rows, or with entries dropped at random."""
        if self.budget == "none":
            return [self._dropped(group, expert) for expert in range(len(group.experts))]
        kept = self.trimmed(group)
        if self.rescale != "density":
            return kept
        densities = self.row_densities(group)
        factors = torch.where(densities > 0, 1 / densities, 0.0)
        shape = (-1, *[1] * (kept[0].dim() - 1)) if kept[0].dim() > 1 else ()
        return [tau * factors.to(tau.dtype).view(shape) for tau in kept]

    def _dropped(self, group: TensorGroup, expert: int) -> Tensor:
        tau = group.task_vectors[expert]
        if self.density < 1.0:
            tau = torch.where(group.uniform(expert) < self.density, tau, 0.0)
        return tau if self.rescale == "none" else tau * (1 / self.density)
