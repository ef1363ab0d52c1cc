"""What the fused forms of sparse merges share. Not a method's name: nothing is looked up here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergewell.methods.ops import SparseMerge
from mergewell.tensor_group import CHUNK, Value

_DIVIDE = {"none": 0, "count": 1, "coefficients": 2}


def combination(method: SparseMerge, experts: int) -> tuple[bool, bool, bool, int, int]:
    """Return how thinned task vectors are combined: the options of `sparse_ops.combine`."""
    agreeing = method.combine == "agreeing"
    usual = 1 if agreeing else 0
    divide = usual if method.divide == "usual" else _DIVIDE[method.divide]
    return agreeing, method.elect == "count", method.votes == "weighted", divide, experts


def ties_left(value: Value, offset: int) -> NDArray[np.int64]:
    """Return how many entries at each threshold a block may still take, [rows]; -1 for all."""
    if "ties_before" not in value:
        return np.full(len(value["key"]), -1)
    left = value["ties_kept"] - value["ties_before"][:, offset // CHUNK]
    return left.clamp(min=0).numpy()


def selection(value: Value, offset: int) -> tuple[int, int]:
    """Return the key down to which a block's entries are selected, and how many ties there."""
    if "key" not in value:
        return 0, -1
    return int(value["key"][0]), int(ties_left(value, offset)[0])
