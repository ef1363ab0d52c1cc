"""The fused form of `slerp`."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.methods.ops import arc_weights
from mergewell.methods.slerp import Slerp


def merge(method: Slerp, block: RawBlock) -> Fused | None:
    """Return the point at `t` on the arc from the first expert to the second."""
    statistic = method.statistics()[0]
    if statistic not in block.statistics:
        return None
    products = block.statistics[statistic]["products"]
    sides = (products[0, 0], products[0, 1], products[1, 1])
    left, right = (float(w) for w in arc_weights(sides, method.t, method.parallel))
    out = np.empty_like(block.experts[0])
    first, second = block.experts
    tally = ops.line(first, second, np.array([left, right], block.computed), block.reference, out)
    return Fused.of(out, tally)
