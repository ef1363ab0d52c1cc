"""The fused form of `SelectedEnergy`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergewell.kernels import sparse_ops
from mergewell.kernels.base import Program, RawBlock
from mergewell.kernels.options import selection
from mergewell.kernels.thresholds import OrderProgram
from mergewell.statistics.base import State
from mergewell.statistics.selected_energy import SelectedEnergy
from mergewell.tensor_group import CHUNK, Value


def program(statistic: SelectedEnergy) -> Program | None:
    """Return the fused form."""
    return _Energy(statistic)


class _Energy(OrderProgram):
    """The threshold of the variances, then a pass for the squares above it."""

    passes = OrderProgram.passes + 1

    def __init__(self, statistic: SelectedEnergy) -> None:
        super().__init__(statistic, variance=True)
        self._density = statistic.density

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether a tensor is read in this pass: only for its energy if all is selected."""
        if index == OrderProgram.passes:
            return True
        return self._density < 1.0 and super().wanted(done, name, index)

    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return one block's counts or, in the last pass, its squares summed by chunk, [C, K]."""
        if index < OrderProgram.passes:
            return super().update(done, block, index)
        assert block.base is not None
        cut, left = selection(self._threshold(done, block.name, block.numel), block)
        sums = np.zeros((-(-block.numel // CHUNK), len(block.experts)), np.float64)
        sparse_ops.energies(
            block.base, block.addresses, cut, left, CHUNK, block.coefficients,
            sums[block.offset // CHUNK :],
        )  # fmt: skip
        return {f"{block.name}:energy": torch.from_numpy(sums)}

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state after pass `index`."""
        if index == OrderProgram.passes:
            return {**done, **summed}
        return super().advance(done, summed, index)

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return the threshold and `energy`, the mean squares, [K], float64."""
        energy: Tensor = done[f"{name}:energy"].sum(0) / max(1, numel)
        return {**self._threshold(done, name, numel), "energy": energy}

    def _threshold(self, done: State, name: str, numel: int) -> Value:
        return {} if self._density == 1.0 else super().value(done, name, numel)
