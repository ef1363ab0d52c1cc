"""The fused form of `metagpt`."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.methods.metagpt import Metagpt


def merge(method: Metagpt, block: RawBlock) -> Fused | None:
    """Return the base plus the task vectors weighed by their squared norms."""
    base, (statistic,) = block.base, method.statistics()
    if base is None or statistic not in block.statistics:
        return None
    shares = method.shares(block.statistics[statistic]["products"])
    weights = block.coefficients * shares.numpy().astype(block.computed)
    one, out = block.computed.type(1), np.empty_like(base)
    return Fused.of(out, ops.task_arithmetic(base, block.addresses, weights, one, one, out))
