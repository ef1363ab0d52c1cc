"""Scale the merged task vector up with depth, so that shallow layers stay near the base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from mergewell.errors import RecipeError
from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, TensorGroup
from mergewell.statistics.base import WeightStatistic
from mergewell.statistics.depth import LAYER_PATTERN, Depth, layer_number
from mergewell.statistics.magnitude import MagnitudeThreshold


class Lines(ops.SparseMerge):
    """Scale the merged task vector up with depth, so that shallow layers stay near the base.

    Layer l of L gets the factor alpha + beta l / (L - 1), tensors outside the layers alpha. What is
    scaled is the sum of the task vectors, or a TIES merge by combine="agreeing" and a density.

    Paper: Wang et al. 2025, "LiNeS", arXiv:2410.17146, section 4 and appendix (single task:
    beta = 1 - alpha).
    Departures: the layer's number is read from the tensor's name by `layer_pattern`; the number of
    layers is `layers` or, unless given, found by a pass over the model. Where alpha is not given
    it is 1 / K for a sum, and 1 for what is already a mean; the paper takes the ratio of the L1
    norms of sum and merged task vector over K, which for the sum is the same.
    """

    paper: ClassVar[str] = "arXiv:2410.17146"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta": (0.0, 0.25, 0.5, 0.75, 1.0),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        neutral={**ops.NEUTRAL_SPARSE, "elect": "mass", "alpha": 1.0, "beta": 0.0, "layers": 1}
    )

    combine: Literal["sum", "agreeing"] = "sum"
    """Add the task vectors up, or elect a sign for each entry and average what agrees (TIES)."""

    density: Fractions = 1.0
    """Fraction of each task vector kept, largest magnitudes first; one, or one an expert."""

    alpha: float | None = None
    """Factor of the first layer; 1 / K, or 1 for a mean, unless given."""

    beta: float = 0.5
    """How much larger the last layer's factor is; tuned from 0 to 1 in the paper."""

    layers: Annotated[int, Field(ge=1)] | None = None
    """Number of layers; found by a pass over the model unless given."""

    layer_pattern: str = LAYER_PATTERN
    """Regular expression for tensor names; its first group is the layer's number, from 0."""

    @model_validator(mode="after")
    def _pattern_has_a_group(self) -> Self:
        try:
            groups = re.compile(self.layer_pattern).groups
        except re.error as error:
            raise ValueError(f"layer_pattern is no regular expression: {error}") from error
        if groups < 1:
            raise ValueError("layer_pattern needs a group, such as layers\\.(\\d+)")
        return self

    def statistics(self) -> Sequence[WeightStatistic]:
        """Return the number of layers, unless it is given, and the trimming's threshold."""
        depth = () if self.layers is not None else (self._depth(),)
        return depth if self.density == 1.0 else (*depth, self._threshold())

    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors with all but their largest entries set to zero."""
        return ops.trim(group, None if self.density == 1.0 else self._threshold())

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the merged task vector times its layer's factor."""
        return group.required_base + self.scale * self.factor(group) * self.combined(group)

    def factor(self, group: TensorGroup) -> float:
        """Return the factor of this tensor's layer.

        Raises:
            RecipeError: the layer's number is not below `layers`.
        """
        averaged = self.combine == "agreeing" if self.divide == "usual" else self.divide != "none"
        alpha = self.alpha
        if alpha is None:
            alpha = 1.0 if averaged else 1 / len(group.experts)
        number = layer_number(self.layer_pattern, group.name)
        if number is None:
            return alpha
        layers = self.layers
        if layers is None:
            layers = int(group.statistic(self._depth())["layers"])
        if number >= layers:
            raise RecipeError(f"lines: {group.name} lies beyond layers = {layers}; raise it.")
        return alpha + self.beta * number / max(1, layers - 1)

    def _depth(self) -> Depth:
        return Depth(pattern=self.layer_pattern, scope="model")

    def _threshold(self) -> MagnitudeThreshold:
        return MagnitudeThreshold(density=self.density)
