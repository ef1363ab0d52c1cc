"""How a merged task vector lies to each expert's: predictors that need weights alone.

Shapes: K experts; K + 2 vectors, the base, the task vectors of the experts and of the merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergewell.statistics.task_vector_sums import TaskVectorSums

Numbers = dict[str, float]
Each = dict[str, list[float]]
"""A number for each expert, by predictor."""

OF_EXPERTS = (
    "w_norm", "w_kept", "w_along", "w_away", "w_away_base", "w_cosine", "w_others", "w_base",
)  # fmt: skip
OF_MERGES = (
    "w_experts", "w_merged_norm", "w_merged_over_mean", "w_merged_over_own", "w_cosine_with_mean",
    "w_cosine_least", "w_norm_largest", "w_norm_ratio",
)  # fmt: skip
"""What `lie` gives."""

_TINY = 1e-30


def products(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    merged: Mapping[str, Tensor],
) -> Tensor:
    """Return inner products of the base and all task vectors, [K + 2, K + 2], float64.

    They are summed over what any expert moved; scalars and integers are not looked at.
    """
    total = torch.zeros(len(experts) + 2, len(experts) + 2, dtype=torch.float64)
    for name, tensor in base.items():
        if not tensor.is_floating_point() or not tensor.ndim or name not in merged:
            continue
        rows = [state[name].flatten() for state in (*experts, merged)]
        found = TaskVectorSums.of(tensor.flatten(), rows).products
        if bool((found.diagonal()[1:] > 0).any()):
            total += found
    return total


def lie(total: Tensor) -> tuple[Numbers, Each]:
    """Return predictors of the whole merge and of each expert, from `products`.

    w_kept: <tau_M, tau_k> / |tau_k|^2, 1 where all of the expert's change is in the merge.
    w_away: |tau_M - tau_k| / |tau_k|, w_away_base: the same over the base's norm. w_along: cosine
    with the merge; w_cosine: mean cosine with the other experts; w_others: the other task vectors'
    norm over the expert's own. w_base: <theta_0, tau_k> / |theta_0|^2, near -1 where the expert has
    nothing of the base. w_norm and w_merged_norm are over the base's norm.
    """
    size = float(total[0, 0]) ** 0.5 or 1.0
    norms = total.diagonal()[1:].clamp(min=_TINY).sqrt()
    taus, last = total[1:-1, 1:-1], total[-1, 1:-1]
    own, whole, count = norms[:-1], norms[-1], len(taus)
    apart = (own.square() + whole.square() - 2 * last).clamp(min=0).sqrt()
    cosines = taus / own[:, None] / own
    rest = (own.square().sum() - own.square()).clamp(min=0).sqrt()
    mean = (taus.sum() / count**2).clamp(min=_TINY).sqrt()
    off = cosines[~torch.eye(count, dtype=torch.bool)]
    each: Each = {
        "w_norm": (own / size).tolist(),
        "w_kept": (last / own.square()).tolist(),
        "w_along": (last / own / whole).tolist(),
        "w_away": (apart / own).tolist(),
        "w_away_base": (apart / size).tolist(),
        "w_cosine": ((cosines.sum(1) - 1) / max(1, count - 1)).tolist(),
        "w_others": (rest / own).tolist(),
        "w_base": (total[0, 1:-1] / max(size**2, _TINY)).tolist(),
    }
    numbers: Numbers = {
        "w_experts": float(count),
        "w_merged_norm": float(whole) / size,
        "w_merged_over_mean": float(whole / mean),
        "w_merged_over_own": float(whole / own.mean()),
        "w_cosine_with_mean": float(last.sum() / count / whole / mean),
        "w_cosine_least": float(off.min()) if len(off) else 1.0,
        "w_norm_largest": float(own.max()) / size,
        "w_norm_ratio": float(own.max() / own.min()),
    }
    return numbers, each
