"""The fused form of `average`."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.kernels import ops
from mergewell.kernels.base import Raw, RawBlock
from mergewell.methods.average import Average


def merge(method: Average, block: RawBlock) -> Raw:
    """Return the weighted average of the experts."""
    out = np.empty_like(block.experts[0])
    # summed by torch as the torch form does
    total = block.computed.type(torch.from_numpy(block.coefficients).sum().item())
    ops.average(block.experts, block.coefficients, total, method.normalize, out)
    return out
