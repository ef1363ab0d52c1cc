"""What the fused forms of sparse merges share: thin tile by tile, then combine.

Not a method's name, so nothing is looked up here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergewell.kernels import ops
from mergewell.kernels.base import Raw, RawBlock
from mergewell.methods.ops import SparseMerge

Thin = Callable[[int, int, int, NDArray[Any]], None]
"""Called as (expert, start, stop, out): put the thinned task vector's tile into out."""

_TILE = 1 << 14
"""Elements thinned before they are combined: K + 1 of these stay in a core's cache."""

_DIVIDE = {"none": 0, "count": 1, "coefficients": 2}


def merge_thinned(method: SparseMerge, block: RawBlock, base: Raw, thin: Thin) -> Raw:
    """Return the base plus the scaled combination of the thinned task vectors."""
    agreeing = method.combine == "agreeing"
    usual = 1 if agreeing else 0
    divide = usual if method.divide == "usual" else _DIVIDE[method.divide]
    taus = np.empty((len(block.experts), _TILE), block.computed)
    out = np.empty_like(base)
    for start in range(0, base.size, _TILE):
        stop = min(start + _TILE, base.size)
        for expert in range(len(block.experts)):
            thin(expert, start, stop, taus[expert])
        ops.combine(
            taus, block.coefficients, agreeing, method.elect == "count", method.votes == "weighted",
            divide, block.computed.type(method.scale), base[start:stop], out[start:stop],
        )  # fmt: skip
    return out
