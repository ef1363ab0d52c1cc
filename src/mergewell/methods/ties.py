"""Trim small changes, elect one sign for each entry, average the task vectors that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.magnitude import MagnitudeThreshold


class Ties(MergeMethod):
    """Trim small changes, elect one sign for each entry, average the task vectors that agree.

    Paper: Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708, section 4, algorithm 1.
    Departures: exactly floor(density * size) entries are kept, equal magnitudes from the front of
    the tensor, where the paper's code keeps all that tie; a draw elects plus, where the paper's
    code takes the commonest sign of the whole model (it matters only where entries cancel to 0).
    The paper trims over the whole model (`trim_scope="model"`), other tools over each tensor.
    """

    paper: ClassVar[str] = "arXiv:2306.01708"
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(
        # a draw elects plus whichever way the models are turned: by count it happens often
        neutral={"density": 1.0, "scale": 1.0, "divide": "count", "elect": "mass"}
    )

    density: Fractions = 0.2
    """Fraction of each task vector kept, largest magnitudes first; one, or one an expert."""

    trim_scope: Literal["tensor", "model"] = "tensor"
    """Keep the largest entries of each tensor, or of the whole model (paper)."""

    elect: ops.Vote = "mass"
    """Elect the sign with the larger total magnitude (paper) or with more experts."""

    votes: Literal["plain", "weighted"] = "plain"
    """Vote with the task vectors as they are (paper) or times their coefficients (mergekit)."""

    divide: ops.Divide = "count"
    """Divide by the number that agree (paper), by the sum of their coefficients, or not at all."""

    scale: float = 1.0
    """Factor on the merged task vector."""

    def statistics(self) -> Sequence[MagnitudeThreshold]:
        """Return the exact threshold of the trimming; nothing is trimmed at density 1."""
        if self.density == 1.0:
            return ()
        return (MagnitudeThreshold(density=self.density, scope=self.trim_scope),)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled mean of what agrees."""
        trimmed = ops.trim(group, next(iter(self.statistics()), None))
        votes = trimmed
        if self.votes == "weighted":
            votes = [c * tau for c, tau in zip(group.coefficients, trimmed, strict=True)]
        elected = ops.elect_sign(votes, self.elect)
        merged = ops.combine_agreeing(group, trimmed, elected, self.divide)
        return group.required_base + self.scale * merged
