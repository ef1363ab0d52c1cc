"""The fused form of `InnerProducts`."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.kernels import ops, product_ops
from mergewell.kernels.base import Program, RawBlock
from mergewell.statistics.base import State
from mergewell.statistics.inner_products import InnerProducts
from mergewell.tensor_group import CHUNK


def program(statistic: InnerProducts) -> Program | None:
    """Return the fused form."""
    return _Products(statistic) if statistic.of == "experts" else _TaskProducts(statistic)


class _Products(Program):
    """Partial sums straight from stored elements."""

    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return this block's partial sums at the places of its chunks, [C, K, K]."""
        del done, index
        experts, first = block.experts, block.offset // CHUNK
        partial = np.zeros((-(-block.numel // CHUNK), len(experts), len(experts)))
        parts = np.empty((-(-experts[0].size // CHUNK), 3))
        rows = partial[first : first + len(parts)]
        for i, left in enumerate(experts):
            for j in range(i) if i else range(len(experts) == 1):
                ops.products(experts[j], left, CHUNK, parts)
                rows[:, j, j], rows[:, i, i] = parts[:, 0], parts[:, 2]
                rows[:, i, j] = rows[:, j, i] = parts[:, 1]
        return {f"{block.name}:products": torch.from_numpy(partial)}


class _TaskProducts(Program):
    """Partial sums of all pairs of task vectors in one pass."""

    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return this block's partial sums at the places of its chunks, [C, K, K]."""
        del done, index
        assert block.base is not None
        first, count = block.offset // CHUNK, len(block.experts)
        partial = np.zeros((-(-block.numel // CHUNK), count, count))
        product_ops.chunk_products(block.base, block.addresses, CHUNK, partial[first:])
        return {f"{block.name}:products": torch.from_numpy(partial)}
