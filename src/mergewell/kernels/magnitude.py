"""The fused form of `MagnitudeThreshold`: histograms of bits straight from stored elements."""

from __future__ import annotations

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
        counts = np.zeros((len(block.experts), 4, 1 << 15), np.int32)
        positive = np.zeros(len(block.experts), np.int64)
        for part in _parts(base.size):
            for k, expert in enumerate(block.experts):
                positive[k] += ops.count_upper(base[part], expert[part], counts[k])
        return {
            f"{owner}:coarse": torch.from_numpy(counts.sum(1, dtype=np.int64)),
            f"{owner}:positive": torch.from_numpy(positive),
        }
    what = "bucket" if index == 1 else "key"
    wanted = [[int(value) for value in row] for row in done[f"{owner}:{what}"]]
    if index == 1:
        counts = np.zeros((len(wanted), len(wanted[0]), 1 << 16), np.int64)
        for part in _parts(base.size):
            for k, expert in enumerate(block.experts):
                for rank, bucket in enumerate(wanted[k]):
                    ops.count_lower(base[part], expert[part], bucket, counts[k, rank])
        return {f"{owner}:fine": torch.from_numpy(counts)}
    ties = np.zeros((len(wanted) * len(wanted[0]), -(-block.numel // CHUNK)), np.int64)
    for part in _parts(base.size):
        chunk = (block.offset + part.start) // CHUNK
        for k, expert in enumerate(block.experts):
            for rank, key in enumerate(wanted[k]):
                row = k * len(wanted[k]) + rank
                ties[row, chunk] = ops.count_ties(base[part], expert[part], key)
    return {f"{block.name}:ties": torch.from_numpy(ties)}


def _parts(size: int) -> list[slice]:
    """Return chunks, so that the base is still in the cache when the next expert is looked at."""
    return [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
