"""The fused form of `KeptNorm`, where all entries share one probability."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.component import for_each
from mergewell.kernels import random_ops
from mergewell.kernels.base import Program, RawBlock
from mergewell.kernels.options import draws
from mergewell.statistics.base import State
from mergewell.statistics.kept_norm import KeptNorm
from mergewell.tensor_group import CHUNK


def program(statistic: KeptNorm) -> Program | None:
    """Return the fused form; probabilities that differ along a row have none."""
    return _Norms(statistic) if statistic.spread is None else None


class _Norms(Program):
    """Sums straight from stored elements; they agree with the torch form's to 1e-14 or so."""

    def __init__(self, statistic: KeptNorm) -> None:
        super().__init__(statistic)
        self._density = statistic.density

    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return this block's partial sums at the places of its chunks, [C, 2 K]."""
        del done, index
        assert block.base is not None
        keys, limits = draws(block, for_each(self._density, len(block.experts)))
        sums = np.zeros((-(-block.numel // CHUNK), 2 * len(block.experts)))
        random_ops.kept_sizes(
            block.base, block.addresses, block.offset, keys, limits, CHUNK, block.coefficients,
            sums[block.offset // CHUNK :],
        )  # fmt: skip
        return {f"{block.name}:sums": torch.from_numpy(sums)}
