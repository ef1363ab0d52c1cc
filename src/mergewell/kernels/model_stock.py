"""The fused form of `model_stock`."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import ops, product_ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.methods.model_stock import ModelStock


def merge(method: ModelStock, block: RawBlock) -> Fused | None:
    """Return the base plus the mean task vector times the ratio of the tensor or of each row."""
    base, statistics = block.base, method.statistics()
    if base is None:
        return None
    out = np.empty_like(base)
    if method.scope == "row":
        tally = product_ops.pull_rows(base, block.addresses, block.row, block.coefficients, out)
        return Fused.of(out, tally)
    if statistics[0] not in block.statistics:
        return None
    computed = block.computed.type
    ratio = product_ops.pull(block.statistics[statistics[0]]["products"].numpy())
    ones = np.ones_like(block.coefficients)  # which do not count here
    tally = ops.task_arithmetic(
        base, block.addresses, ones, computed(len(ones)), computed(ratio), out
    )
    return Fused.of(out, tally)
