"""Trim small changes, elect one sign for each entry, average the task vectors that agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, TensorGroup
from mergewell.statistics.magnitude import MagnitudeNorms, MagnitudeThreshold


class Ties(ops.SparseMerge):
    """Trim small changes, elect one sign for each entry, average the task vectors that agree.

    m_k keeps the largest; s = sign(sum_k m_k tau_k);
    theta = theta_0 + scale mean_k {c_k m_k tau_k : sign(m_k tau_k) = s}.

    Paper: Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708, section 4, algorithm 1.
    Departures: exactly floor(density * size) entries are kept, equal magnitudes from the front of
    the tensor, where the paper's code keeps all that tie; a draw elects plus, where the paper's
    code takes the commonest sign of the whole model (it matters only where entries cancel to 0).
    The paper trims over the whole model (`trim_scope="model"`), other tools over each tensor.
    mergekit's ties: density 1.0 unless given, votes="weighted", divide="coefficients"
    (normalize: true) or "none", scale for lambda, rescale="norm" for rescale: true.
    """

    paper: ClassVar[str] = "arXiv:2306.01708"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.05, 0.1, 0.2, 0.4, 0.8),
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4),
    }
    laws: ClassVar[Laws] = Laws(
        # a draw elects plus whichever way the models are turned: by count it happens often
        neutral={**ops.NEUTRAL_SPARSE, "elect": "mass"}
    )

    density: Fractions = 0.2
    """Fraction of each task vector kept, largest magnitudes first; one, or one an expert."""

    trim_scope: Literal["tensor", "model"] = "tensor"
    """Keep the largest entries of each tensor, or of the whole model (paper)."""

    rescale: Literal["none", "norm"] = "none"
    """Leave what is kept as it is (paper), or restore each task vector's L1 norm."""

    def statistics(self) -> Sequence[MagnitudeThreshold]:
        """Return the exact threshold of the trimming; nothing is trimmed at density 1."""
        if self.density == 1.0:
            return ()
        kind = MagnitudeNorms if self.rescale == "norm" else MagnitudeThreshold
        return (kind(density=self.density, scope=self.trim_scope),)

    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors with all but their largest entries set to zero."""
        threshold = next(iter(self.statistics()), None)
        trimmed = ops.trim(group, threshold)
        if threshold is None or self.rescale == "none":
            return trimmed
        return ops.restore_norms(trimmed, group.statistic(threshold))
