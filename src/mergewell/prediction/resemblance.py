"""Whether the merge still sees in a task's inputs what the task's expert sees: CKA, of few inputs.

Shapes: N inputs of one task, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergewell.models.ensemble import ensemble_outputs
from mergewell.statistics.activation_cka import linear_cka

Numbers = dict[str, float]

ALIKE = (
    "u_cka_own", "u_cka_base", "u_cka_base_own", "u_cka_others", "u_cka_others_own", "u_cka_said",
    "u_cka_said_own", "u_cka_held", "u_cka_held_own", "u_cka_middle", "u_cka_middle_base_own",
    "u_away_middle", "u_away_last", "u_norm_last",
)  # fmt: skip
"""What `resemblance` gives."""


def resemblance(
    last: Sequence[Tensor], middle: Sequence[Tensor], logits: Sequence[Tensor], *, expert: int
) -> Numbers:
    """Return the predictors of one task from features [N, D] of the last and the middle block.

    Each sequence holds the base, the experts and the merge, in this order; `logits` [N, C] the
    experts' alone. u_cka_own: unbiased linear CKA of merge and expert; _base, _others: of the merge
    with these; _base_own, _others_own: of these with the expert; _said: of the merge's features
    with the expert's probabilities, _held: with the ensemble's. u_away_*: |merge - expert| /
    |expert|, u_norm_last: |merge| / |expert|.
    """
    own, merged = expert + 1, len(last) - 1
    others = [k for k in range(1, merged) if k != own]
    said = logits[expert].double().softmax(-1)
    together = ensemble_outputs([one.double().log_softmax(-1) for one in logits], "logits").softmax(
        -1
    )
    alike = linear_cka(_stacked([*last, said, together]))
    inside = linear_cka(_stacked([middle[0], middle[own], middle[-1]]))
    answer, all_answers = merged + 1, merged + 2
    return {
        "u_cka_own": float(alike[merged, own]),
        "u_cka_base": float(alike[merged, 0]),
        "u_cka_base_own": float(alike[0, own]),
        "u_cka_others": float(alike[merged, others].mean()) if others else 1.0,
        "u_cka_others_own": float(alike[own, others].mean()) if others else 1.0,
        "u_cka_said": float(alike[merged, answer]),
        "u_cka_said_own": float(alike[own, answer]),
        "u_cka_held": float(alike[merged, all_answers]),
        "u_cka_held_own": float(alike[own, all_answers]),
        "u_cka_middle": float(inside[2, 1]),
        "u_cka_middle_base_own": float(inside[0, 1]),
        "u_away_middle": _away(middle[-1], middle[own]),
        "u_away_last": _away(last[-1], last[own]),
        "u_norm_last": _norm(last[-1]) / max(_norm(last[own]), 1e-12),
    }


def _stacked(features: Sequence[Tensor]) -> Tensor:
    """Return features of different widths as one tensor; columns of zeros change no CKA."""
    width = max(one.shape[-1] for one in features)
    found = torch.zeros(len(features), len(features[0]), width, dtype=torch.float64)
    for row, one in zip(found, features, strict=True):
        row[:, : one.shape[-1]] = one
    return found


def _away(one: Tensor, other: Tensor) -> float:
    return _norm(one - other) / max(_norm(other), 1e-12)


def _norm(features: Tensor) -> float:
    return float(features.double().square().sum()) ** 0.5
