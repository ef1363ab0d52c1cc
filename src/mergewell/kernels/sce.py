"""The fused form of `sce`."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.kernels import sparse_ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.kernels.options import selection
from mergewell.methods.sce import Sce
from mergewell.tensor_group import CHUNK


def merge(method: Sce, block: RawBlock) -> Fused | None:
    """Return the base plus the weighted mean of the kept changes that agree."""
    base, (statistic,) = block.base, method.statistics()
    if base is None or statistic not in block.statistics:
        return None
    value = block.statistics[statistic]
    cut, left = selection(value, block)
    weights = method.weights(value["energy"])
    coefficients = torch.from_numpy(block.coefficients)
    shares = (coefficients * weights.to(coefficients.dtype)).numpy()
    out = np.empty_like(base)
    tally = sparse_ops.select_and_combine(
        base, block.addresses, cut, left, CHUNK, shares, block.computed.type(method.scale), out
    )
    return Fused.of(out, tally)
