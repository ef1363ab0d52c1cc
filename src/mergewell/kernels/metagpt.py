"""The fused form of `metagpt`."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.kernels import ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.methods.metagpt import Metagpt


def merge(method: Metagpt, block: RawBlock) -> Fused | None:
    """Return the base plus the task vectors weighed by their squared norms."""
    base, (statistic,) = block.base, method.statistics()
    if base is None or statistic not in block.statistics:
        return None
    energy = block.statistics[statistic]["products"].diagonal()
    whole = energy.sum()
    shares = (energy / torch.where(whole == 0, 1.0, whole)).numpy()  # as the torch form does it
    weights = block.coefficients * shares.astype(block.computed)
    one, out = block.computed.type(1), np.empty_like(base)
    return Fused.of(out, ops.task_arithmetic(base, block.addresses, weights, one, one, out))
