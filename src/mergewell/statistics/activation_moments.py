"""Mean and variance of every node of a block's output, for every model."""

from __future__ import annotations

import torch

from mergewell.errors import DataError
from mergewell.statistics.activation import BlockOutputs
from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value


class ActivationMoments(Statistic[BlockOutputs]):
    """Mean and variance of each node over all observations, [P, D] each.

    State: sums of values and of squares, in float64, and the number of observations.
    """

    def update(self, state: State, batch: BlockOutputs) -> State:
        """Return the state with one more batch."""
        # float32 sums of a batch are added up in pairs, so that their errors do not grow with it
        sums = torch.stack([rows.sum(0) for rows in batch.rows]).to(torch.float64)
        squares = torch.stack([rows.square().sum(0) for rows in batch.rows]).to(torch.float64)
        count = torch.tensor(len(batch.rows[0]), dtype=torch.float64)
        return self.join(state, {"sum": sums, "square": squares, "count": count})

    def value(self, state: State) -> Value:
        """Return `mean` and (biased) `variance`, [P, D] float64.

        Raises:
            DataError: there were no observations.
        """
        if not state or float(state["count"]) == 0:
            raise DataError("Moments of no observations are not defined; give some data.")
        mean = state["sum"] / state["count"]
        variance = state["square"] / state["count"] - mean.square()
        return {"mean": mean, "variance": variance.clamp(min=0)}
