"""What the fused forms of sparse merges share. Not a method's name: nothing is looked up here."""

from __future__ import annotations

from mergewell.methods.ops import SparseMerge

_DIVIDE = {"none": 0, "count": 1, "coefficients": 2}


def combination(method: SparseMerge) -> tuple[bool, bool, bool, int]:
    """Return how the thinned task vectors are combined: the options of `kernels.ops.combine`."""
    agreeing = method.combine == "agreeing"
    usual = 1 if agreeing else 0
    divide = usual if method.divide == "usual" else _DIVIDE[method.divide]
    return agreeing, method.elect == "count", method.votes == "weighted", divide
