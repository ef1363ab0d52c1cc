"""Move the first expert's entries to the second's where the two are near."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup


class Nearswap(MergeMethod):
    """Move the first expert's entries to the second's where the two are near.

    theta = (1 - w) theta_1 + w theta_2, w = min(1, t / |theta_1 - theta_2|) entry by entry: no
    entry moves by more than t, and those nearer than t are swapped.

    Paper: none; alchemonaut 2024, the model card of QuartetAnemoi-70B-t0.0001.
    Departures: none. Coefficients are not used.
    mergekit's nearswap: the same t, its base_model as the first expert.
    """

    paper: ClassVar[str] = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    needs: ClassVar[Needs] = Needs(experts=2)
    laws: ClassVar[Laws] = Laws(
        order_free="the first expert is moved towards the second.",
        single_expert="two experts are needed.",
        scale="t is an absolute distance.",
    )

    t: Annotated[float, Field(gt=0)] = 1e-4
    """The farthest that an entry moves, in units of the weights."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the first expert with its entries moved by `t` at most."""
        first, second = group.experts
        weight = (self.t / (first - second).abs().clamp(min=1e-6)).clamp(max=1)
        return weight * second + (1 - weight) * first
