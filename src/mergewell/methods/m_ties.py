"""TIES whose rows are trimmed by their M-Loss: nodes that merge badly keep fewer entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, TensorGroup
from mergewell.statistics.magnitude import MagnitudeThreshold


class MTies(ops.GuidedMerge):
    """TIES whose rows are trimmed by their M-Loss: nodes that merge badly keep fewer entries.

    As `ties`; in a row of M-Loss L, m_k = 1 for the largest d(L) of its entries.

    Weights whose nodes a calibration measured are trimmed row by row, all other tensors as a whole;
    then a sign is elected for each entry and the task vectors that agree are averaged. Needs
    `calibration: FILE` in the recipe.

    Paper: Wang et al. 2026, "M-Loss", arXiv:2602.08564; details from its released code.
    Departures: `budget="neutral"` keeps the mean density, the paper's "rank" lowers it by half the
    spread. Equal magnitudes in a row are kept from the front, and the number is exact; the code
    keeps all that tie (`ties="keep"`). Whatever the calibration measured is guided, convolutions
    and gated units too; the code guides the first layer of each MLP. In our measurements M-Loss
    did not beat its controls: see docs/studies/m_loss.md before preferring this to `ties`.
    """

    paper: ClassVar[str] = "arXiv:2602.08564"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.2, 0.4, 0.8),
        "spread": (0.1, 0.2),
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4),
    }
    laws: ClassVar[Laws] = Laws(neutral={**ops.NEUTRAL_SPARSE, "elect": "mass", "spread": 0.0})

    def statistics(self) -> Sequence[MagnitudeThreshold]:
        """Return the threshold of tensors that are trimmed as a whole."""
        whole = self.budget == "none" and self.density < 1.0
        return (MagnitudeThreshold(density=self.density),) if whole else ()

    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors trimmed by rows, or as a whole."""
        if self.budget != "none":
            return self.trimmed(group)
        return ops.trim(group, next(iter(self.statistics()), None))
