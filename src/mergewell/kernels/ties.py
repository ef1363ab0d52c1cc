"""The fused form of `ties`."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import ops
from mergewell.kernels.base import Raw, RawBlock
from mergewell.kernels.sparse import combination
from mergewell.methods.ties import Ties
from mergewell.tensor_group import CHUNK


def merge(method: Ties, block: RawBlock) -> Raw | None:
    """Return the base plus the scaled combination of what is kept and agrees."""
    base, statistics = block.base, method.statistics()
    if base is None or method.rescale != "none":
        return None
    if not statistics:
        cuts, left = [0] * len(block.experts), [-1] * len(block.experts)
    elif statistics[0] in block.statistics:
        value = block.statistics[statistics[0]]
        cuts = [int(key) for key in value["key"]]
        left = [-1] * len(cuts)
        if "ties_before" in value:
            before = value["ties_before"][:, block.offset // CHUNK]
            left = [max(0, int(count)) for count in value["ties_kept"] - before]
    else:
        return None

    out = np.empty_like(base)
    ops.ties(
        base, block.experts, np.array(cuts, np.int32), np.array(left), block.coefficients,
        combination(method), block.computed.type(method.scale), out,
    )  # fmt: skip
    return out
