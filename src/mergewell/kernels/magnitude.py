"""The fused form of `MagnitudeThreshold`: histograms of bits straight from stored elements."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from mergewell.kernels import ops
from mergewell.kernels.base import RawBlock
from mergewell.statistics.base import State
from mergewell.statistics.magnitude import MagnitudeThreshold
from mergewell.tensor_group import CHUNK


def update(statistic: MagnitudeThreshold, done: State, block: RawBlock, index: int) -> State | None:
    """Return one block's counts; see `OrderStatistic.update`."""
    base = block.base
    if base is None or type(statistic) is not MagnitudeThreshold:
        return None
    owner = f"{block.name if statistic.scope == 'tensor' else ''}:0"
    if index == 0:
        counts = np.zeros((len(block.experts), 1 << 15), np.int64)
        positive: list[int] = [
            ops.count_upper(base, e, c) for e, c in zip(block.experts, counts, strict=True)
        ]
        return {
            f"{owner}:coarse": torch.from_numpy(counts),
            f"{owner}:positive": torch.tensor(positive),
        }
    if index == 1:
        buckets = done[f"{owner}:bucket"]
        counts = np.zeros((*buckets.shape, 1 << 16), np.int64)
        experts, ranks = buckets.shape
        for expert, rank in product(range(experts), range(ranks)):
            bucket = int(buckets[expert, rank])
            ops.count_lower(base, block.experts[expert], bucket, counts[expert, rank])
        return {f"{owner}:fine": torch.from_numpy(counts)}
    cut = done[f"{owner}:key"]
    ties = torch.zeros(cut.numel(), -(-block.numel // CHUNK), dtype=torch.int64)
    for row, key in enumerate(int(key) for key in cut.flatten()):
        expert = block.experts[row // cut.shape[1]]
        for start in range(0, base.size, CHUNK):
            stop = min(start + CHUNK, base.size)
            chunk = (block.offset + start) // CHUNK
            ties[row, chunk] = ops.count_ties(base[start:stop], expert[start:stop], key)
    return {f"{block.name}:ties": ties}
