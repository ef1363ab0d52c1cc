"""The fused form of `dare`."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.kernels import random_ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.kernels.options import combination, draws
from mergewell.methods.base import for_each
from mergewell.methods.dare import Dare
from mergewell.methods.ops import restore_norms


def merge(method: Dare, block: RawBlock) -> Fused | None:
    """Return the base plus the scaled combination of the thinned task vectors."""
    base, statistics = block.base, method.statistics()
    if base is None or any(statistic not in block.statistics for statistic in statistics):
        return None
    densities = np.array(for_each(method.density, len(block.experts)), np.float64)
    keys, limits = draws(block, [float(density) for density in densities])
    factors = 1 / densities if method.rescale == "density" else np.ones_like(densities)
    if statistics:
        ones = list(torch.from_numpy(np.ones_like(block.coefficients)))
        norms = block.statistics[statistics[0]]
        factors = torch.stack(restore_norms(ones, norms)).numpy()
    out = np.empty_like(base)
    tally = random_ops.drop_and_combine(
        base, block.addresses, block.offset, keys, limits, factors.astype(block.computed),
        block.coefficients, combination(method, len(densities)), block.computed.type(method.scale),
        out,
    )  # fmt: skip
    return Fused.of(out, tally)
