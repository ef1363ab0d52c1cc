"""The fused form of `InnerProducts`, for two experts."""

from __future__ import annotations

import torch

from mergewell.kernels import ops
from mergewell.kernels.base import Program, RawBlock
from mergewell.statistics.base import State
from mergewell.statistics.inner_products import InnerProducts
from mergewell.tensor_group import CHUNK


def program(statistic: InnerProducts) -> Program | None:
    """Return the fused form, where it is between two or more experts."""
    return _Products(statistic) if statistic.of == "experts" else None


class _Products(Program):
    """Partial sums straight from stored elements."""

    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return this block's partial sums at the places of its chunks, [C, K, K]."""
        del done, index
        experts = block.experts
        partial = torch.zeros(-(-block.numel // CHUNK), len(experts), len(experts)).double()
        for start in range(0, experts[0].size, CHUNK):
            chunk = slice(start, min(start + CHUNK, experts[0].size))
            sums = partial[(block.offset + start) // CHUNK]
            for i, left in enumerate(experts):
                for j in range(i) if i else range(len(experts) == 1):
                    parts = ops.products(experts[j][chunk], left[chunk])
                    sums[j, j], sums[i, j], sums[i, i] = parts
                    sums[j, i] = sums[i, j]
        return {f"{block.name}:products": partial}
