"""The fused form of `dare`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergewell.kernels import ops
from mergewell.kernels.base import Raw, RawBlock
from mergewell.kernels.sparse import merge_thinned
from mergewell.methods.base import for_each
from mergewell.methods.dare import Dare
from mergewell.tensor_group import random_key


def merge(method: Dare, block: RawBlock) -> Raw | None:
    """Return the base plus the scaled combination of the thinned task vectors."""
    base = block.base
    if base is None or method.rescale == "norm":
        return None
    densities = [block.computed.type(d) for d in for_each(method.density, len(block.experts))]
    keys = [np.int64(random_key(block.seed, block.name, k)) for k in range(len(densities))]
    # an integer number is below the limit just where number / 2^24 is below the density
    limits = [np.int64(np.ceil(float(density) * (1 << 24))) for density in densities]
    one = block.computed.type(1)
    divisors = [density if method.rescale == "density" else one for density in densities]

    def thin(expert: int, start: int, stop: int, out: NDArray[Any]) -> None:
        own, other = base[start:stop], block.experts[expert][start:stop]
        ops.drop(
            own, other, block.offset + start, keys[expert], limits[expert], divisors[expert], out
        )

    return merge_thinned(method, block, base, thin)
