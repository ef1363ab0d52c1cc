"""What an expert's own task tells of how far it got beyond its base: no merge is looked at.

Retention is merged over own accuracy, so a merge keeps much of an expert that learned little. How
little can be seen without labels: inputs of different classes still look alike to it, and it would
answer otherwise had it gone on as far again. Shapes: N inputs of one task, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

Numbers = dict[str, float]

ALONE = ("u_alike_base", "u_alike_own", "u_alike_beyond", "u_beyond_own")
"""What `alone` gives."""

FAR = 2.0
"""How many times its task vector the expert is followed."""

_COUNTED = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of names of what was counted and not learned."""


def beyond(base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the expert had it gone on as far again: base + 2 (expert - base).

    Running statistics, whole numbers and what the base lacks stay the expert's own.
    """
    return {
        name: base[name] + FAR * (tensor - base[name])
        if name in base
        and tensor.is_floating_point()
        and tensor.shape == base[name].shape
        and name.rpartition(".")[2] not in _COUNTED
        else tensor
        for name, tensor in expert.items()
    }


def alone(
    base: Tensor, own: Tensor, further: Tensor, *, said: Tensor, said_further: Tensor
) -> Numbers:
    """Return the predictors of one expert from features [N, D] and answers, logits [N, C].

    `base`, `own`, `further`: last block's features of the base, the expert and `beyond`; `said` of
    the last two. u_alike_*: mean cosine between features of different inputs, near one where a
    model hardly tells them apart; u_beyond_own: mean probability that both give one answer.
    """
    both = said.double().softmax(-1) * said_further.double().softmax(-1)
    return {
        "u_alike_base": _alike(base),
        "u_alike_own": _alike(own),
        "u_alike_beyond": _alike(further),
        "u_beyond_own": float(both.sum(-1).mean()),
    }


def _alike(features: Tensor) -> float:
    """Return the mean cosine of different rows; one where there is only one row."""
    count = len(features)
    if count < 2:
        return 1.0
    whole = functional.normalize(features.double(), dim=-1).sum(0).square().sum()
    return float((whole - count) / (count * (count - 1)))
