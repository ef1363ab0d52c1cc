"""The fused form of `dare`."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import random_ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.kernels.options import combination
from mergewell.methods.base import for_each
from mergewell.methods.dare import Dare
from mergewell.tensor_group import random_key


def merge(method: Dare, block: RawBlock) -> Fused | None:
    """Return the base plus the scaled combination of the thinned task vectors."""
    base = block.base
    if base is None or method.rescale == "norm":
        return None
    densities = np.array(for_each(method.density, len(block.experts)), np.float64)
    keys = np.array([random_key(block.seed, block.name, k) for k in range(len(densities))])
    # an integer number is below the limit just where number / 2^24 is below the density
    limits = np.ceil(densities * (1 << 24)).astype(np.int32)
    factors = 1 / densities if method.rescale == "density" else np.ones_like(densities)
    out = np.empty_like(base)
    tally = random_ops.drop_and_combine(
        base, block.addresses, block.offset, keys, limits, factors.astype(block.computed),
        block.coefficients, combination(method, len(densities)), block.computed.type(method.scale),
        out,
    )  # fmt: skip
    return Fused.of(out, tally)
