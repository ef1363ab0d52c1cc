"""The fused form of `task_arithmetic`."""

from __future__ import annotations

import numpy as np
import torch

from mergewell.kernels import ops
from mergewell.kernels.base import Fused, RawBlock
from mergewell.methods.task_arithmetic import TaskArithmetic


def merge(method: TaskArithmetic, block: RawBlock) -> Fused | None:
    """Return the base plus the scaled sum of the task vectors."""
    if block.base is None:
        return None
    computed = block.computed.type
    divisor = computed(1)
    if method.divide == "count":
        divisor = computed(len(block.experts))
    elif method.divide == "coefficients":
        total = computed(sum(torch.from_numpy(block.coefficients)))
        divisor = total if abs(float(total)) >= 1e-8 else divisor
    out = np.empty_like(block.base)
    tally = ops.task_arithmetic(
        block.base, block.addresses, block.coefficients, divisor, computed(method.scale), out
    )
    return Fused.of(out, tally)
