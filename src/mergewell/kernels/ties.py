"""The fused form of `ties`."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import sparse_ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.kernels.options import chunks_of, combination, ties_left
from mergewell.methods.ties import Ties
from mergewell.tensor_group import CHUNK


def merge(method: Ties, block: RawBlock) -> Fused | None:
    """Return the base plus the scaled combination of what is kept and agrees."""
    base, statistics, experts = block.base, method.statistics(), len(block.experts)
    if base is None or method.rescale != "none":
        return None
    cuts = np.full((experts, 2), sparse_ops.NONE_ABOVE, np.int32)
    left = np.full((experts, 2, chunks_of(block) + 1), -1)
    if not statistics:
        cuts[:, 1] = 0
    elif statistics[0] in block.statistics:
        value = block.statistics[statistics[0]]
        cuts[:, 1] = value["key"].numpy()
        left[:, 1] = ties_left(value, block)
    else:
        return None
    out = np.empty_like(base)
    tally = sparse_ops.trim_and_combine(
        base, block.addresses, cuts, left, CHUNK, block.coefficients,
        combination(method, experts), block.computed.type(method.scale), out,
    )  # fmt: skip
    return Fused.of(out, tally)
