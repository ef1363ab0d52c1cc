"""The fused form of `average`."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.kernels import ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.methods.average import Average


def merge(method: Average, block: RawBlock) -> Fused:
    """Return the weighted average of the experts."""
    out = np.empty_like(block.experts[0])
    # summed by torch as the torch form does
    total = block.computed.type(torch.from_numpy(block.coefficients).sum().item())
    tally = ops.average(
        block.addresses, block.coefficients, total, method.normalize, block.reference, out
    )
    return Fused.of(out, tally)
