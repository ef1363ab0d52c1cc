"""The fused form of `della`, of bfloat16 with probabilities that rise with the rank."""

from __future__ import annotations

import numpy as np

from mergewell.kernels import rank_ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.kernels.options import combination
from mergewell.methods.base import for_each
from mergewell.methods.della import Della
from mergewell.tensor_group import random_key


def merge(method: Della, block: RawBlock) -> Fused | None:
    """Return the base plus the scaled combination of the thinned task vectors."""
    base, experts = block.base, len(block.experts)
    if base is None or method.rescale == "norm" or method.favour != "rank":
        return None
    if block.computed != np.float32:  # float64 magnitudes are finer than the keys that are sorted
        return None
    densities = np.array(for_each(method.density, experts), np.float64)
    spreads = np.array(for_each(method.epsilon, experts), np.float64)
    spreads[densities == 1.0] = 0.0
    computed = block.computed
    bounds = np.stack([densities - spreads, 2 * spreads], axis=1).astype(computed)
    out = np.empty_like(base)
    tally = rank_ops.drop_by_rank_and_combine(
        base, block.addresses, block.row, block.offset,
        np.array([random_key(block.seed, block.name, k) for k in range(experts)]), bounds,
        method.rescale == "probability", block.coefficients, combination(method, experts),
        computed.type(method.scale), out,
    )  # fmt: skip
    return Fused.of(out, tally)
