"""Drift: how far a block's outputs move from the base's, and the merged from the experts' mean.

Shapes: K experts; P models (the base, the K experts, the merged model); R observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.errors import DataError
from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value

BLOCK = 1 << 16
"""Elements looked at together: they stay in the cache, and float32 adds up so few to 1e-6."""


@dataclass(frozen=True, slots=True)
class Sides:
    """What the models gave for one batch."""

    outputs: Sequence[Tensor]
    """P tensors of one shape."""

    coefficients: Sequence[float]
    """K coefficients on the simplex, of the ensemble."""


class ActivationDrift(Statistic[Sides]):
    """Norms of differences between models, as fractions, over all observations.

    The merged model's is the output gap of papers.md 1.2.3 ("without merge") at this place. The
    ensemble is written h_1 + sum_j c_j (h_j - h_1), so that equal experts give theirs exactly.
    """

    def update(self, state: State, batch: Sides) -> State:
        """Return the state with one more batch."""
        flat = [output.reshape(-1) for output in batch.outputs]
        sums = torch.zeros(len(flat) + 1, dtype=torch.float64)
        for start in range(0, flat[0].numel(), BLOCK):
            base, *experts, merged = (output[start : start + BLOCK].float() for output in flat)
            ensemble = experts[0]
            for share, other in zip(batch.coefficients[1:], experts[1:], strict=True):
                ensemble = ensemble + share * (other - experts[0])
            parts = [*(expert - base for expert in experts), base, merged - ensemble, ensemble]
            sums += torch.stack([part @ part for part in parts]).to(torch.float64).cpu()
        *change, base, gap, ensemble = sums.unbind()
        return self.join(
            state,
            {"change": torch.stack(change), "base": base, "gap": gap, "ensemble": ensemble},
        )

    def value(self, state: State) -> Value:
        """Return the drifts, float64; 0 where there is nothing to compare with.

        - `experts` [K]: ||h_j - h_0|| / ||h_0||, expert j against the base
        - `merged` []: ||h - sum_j c_j h_j|| / ||sum_j c_j h_j||

        Raises:
            DataError: there were no observations.
        """
        if not state:
            raise DataError("Drift of no observations is not defined; give some data.")
        return {
            "experts": _ratio(state["change"], state["base"]),
            "merged": _ratio(state["gap"], state["ensemble"]),
        }


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return (above / below).sqrt() if float(below) > 0 else torch.zeros_like(above)
