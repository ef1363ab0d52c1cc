"""Features: what every model made of every sample, kept as it is for whoever asks later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.errors import DataError
from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value


@dataclass(frozen=True, slots=True)
class SampleFeatures:
    """One vector a sample from every model."""

    features: Tensor
    """[P, N, D]."""

    start: int
    """Number of the first sample among all samples of the data."""


class ActivationFeatures(Statistic[SampleFeatures]):
    """The vectors of all samples, in the order of the data whatever the order of joining."""

    def update(self, state: State, batch: SampleFeatures) -> State:
        """Return the state with one more batch."""
        count = batch.features.shape[1]
        return self.join(
            state,
            {
                "features": batch.features.float().cpu(),
                "index": torch.arange(batch.start, batch.start + count),
            },
        )

    def join(self, left: State, right: State) -> State:
        """Return both parts one after the other."""
        if not left or not right:
            return left or right
        return {
            "features": torch.cat([left["features"], right["features"]], dim=1),
            "index": torch.cat([left["index"], right["index"]]),
        }

    def value(self, state: State) -> Value:
        """Return `features` [P, N, D], float32, in the order of the data.

        Raises:
            DataError: there were no samples.
        """
        if not state:
            raise DataError("There are no features of no samples; give some data.")
        return {"features": state["features"][:, state["index"].argsort()]}
