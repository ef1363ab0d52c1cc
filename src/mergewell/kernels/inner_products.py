"""The fused form of `InnerProducts`, for two experts."""

from __future__ import annotations

import torch

from mergewell.kernels import ops
from mergewell.kernels.base import RawBlock
from mergewell.statistics.base import State
from mergewell.statistics.inner_products import InnerProducts
from mergewell.tensor_group import CHUNK


def update(statistic: InnerProducts, done: State, block: RawBlock, index: int) -> State | None:
    """Return this block's partial sums at the places of its chunks, [C, 2, 2]."""
    del done, index
    if statistic.of != "experts" or len(block.experts) != 2:
        return None
    first, second = block.experts
    partial = torch.zeros(-(-block.numel // CHUNK), 2, 2, dtype=torch.float64)
    for start in range(0, first.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, first.size))
        xx, xy, yy = ops.products(first[chunk], second[chunk])
        sums = torch.tensor([[xx, xy], [xy, yy]], dtype=torch.float64)
        partial[(block.offset + start) // CHUNK] = sums
    return {f"{block.name}:products": partial}
