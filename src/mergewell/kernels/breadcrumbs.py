"""The fused form of `breadcrumbs`, with thresholds over whole tensors."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import sparse_ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.kernels.options import combination, ties_left
from mergewell.methods.breadcrumbs import Breadcrumbs
from mergewell.tensor_group import CHUNK


def merge(method: Breadcrumbs, block: RawBlock) -> Fused | None:
    """Return the base plus the scaled combination of the middle of the task vectors."""
    base, statistics, experts = block.base, method.statistics(), len(block.experts)
    if base is None or method.rescale != "none" or not statistics:
        return None
    if statistics[0] not in block.statistics:
        return None
    value = block.statistics[statistics[0]]
    cuts = value["key"].numpy().reshape(experts, 2)
    left = ties_left(value, block).reshape(experts, 2, -1)
    out = np.empty_like(base)
    tally = sparse_ops.trim_and_combine(
        base, block.addresses, cuts, left, CHUNK, block.coefficients,
        combination(method, experts), block.computed.type(method.scale), out,
    )  # fmt: skip
    return Fused.of(out, tally)
