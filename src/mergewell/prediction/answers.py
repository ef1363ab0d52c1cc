"""What a merge answers on a task's few unlabelled inputs beside base, experts and their ensemble.

Shapes: N inputs of one task, C classes. All from logits; nothing knows the right answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from mergewell.evaluate import kl_divergence
from mergewell.models.ensemble import ensemble_outputs

Numbers = dict[str, float]

UNLABELLED = (
    "u_chance",
    "u_kl_own",
    "u_kl_ensemble",
    "u_kl_base_own",
    "u_kl_base",
    "u_kl_ensemble_own",
    "u_agreement_own",
    "u_agreement_ensemble",
    "u_agreement_base",
    "u_ensemble_own",
    "u_base_own",
    "u_others_own",
    "u_others_worst",
    "u_believed",
    "u_held_ensemble",
    "u_held_mix",
    "u_held_all",
    "u_conf",
    "u_conf_own",
    "u_conf_ensemble",
    "u_conf_base",
    "u_entropy",
    "u_entropy_own",
    "u_entropy_ensemble",
    "u_mutual",
    "u_mutual_own",
    "u_mutual_base",
    "u_cosine",
    "u_cosine_ensemble",
    "u_cosine_base_own",
)
"""What `answers` gives."""


def answers(base: Tensor, experts: Sequence[Tensor], merged: Tensor, *, expert: int) -> Numbers:
    """Return the predictors of one task from all models' logits [N, C] on its inputs.

    `expert` says whose task it is. u_agreement_*: share of equal answers; u_kl_*: mean divergence
    in nats; u_conf*: mean largest probability; u_entropy*: mean entropy over log C; u_mutual*:
    entropy of the mean answer less the mean entropy, over log C, small where all inputs are
    answered alike; u_held_*: probability that a reference gives the merge's answer, over what it
    gives the expert's, the retention if the reference were right; u_cosine: of centred logits.
    """
    logs = [one.double().log_softmax(-1) for one in experts]
    own, ours, below = logs[expert], merged.double().log_softmax(-1), base.double().log_softmax(-1)
    together = ensemble_outputs(logs, "logits").log_softmax(-1)
    said, mine = own.argmax(-1), ours.argmax(-1)
    others = [_mean(one.argmax(-1) == said) for k, one in enumerate(logs) if k != expert] or [1.0]
    mix = (own.exp() + together.exp()) / 2
    everyone = (own.exp() + together.exp() + ours.exp() + below.exp()) / 4
    number = own.shape[-1]
    return {
        "u_chance": 1 / number,
        "u_kl_own": _mean(kl_divergence(own, ours)),
        "u_kl_ensemble": _mean(kl_divergence(together, ours)),
        "u_kl_base_own": _mean(kl_divergence(own, below)),
        "u_kl_base": _mean(kl_divergence(below, ours)),
        "u_kl_ensemble_own": _mean(kl_divergence(own, together)),
        "u_agreement_own": _mean(said == mine),
        "u_agreement_ensemble": _mean(together.argmax(-1) == mine),
        "u_agreement_base": _mean(below.argmax(-1) == mine),
        "u_ensemble_own": _mean(together.argmax(-1) == said),
        "u_base_own": _mean(below.argmax(-1) == said),
        "u_others_own": sum(others) / len(others),
        "u_others_worst": min(others),
        "u_believed": _mean(_at(ours.exp(), said)),
        "u_held_ensemble": _ratio(together.exp(), mine, said),
        "u_held_mix": _ratio(mix, mine, said),
        "u_held_all": _ratio(everyone, mine, said),
        "u_conf": _mean(ours.exp().amax(-1)),
        "u_conf_own": _mean(own.exp().amax(-1)),
        "u_conf_ensemble": _mean(together.exp().amax(-1)),
        "u_conf_base": _mean(below.exp().amax(-1)),
        "u_entropy": _entropy(ours),
        "u_entropy_own": _entropy(own),
        "u_entropy_ensemble": _entropy(together),
        "u_mutual": _mutual(ours),
        "u_mutual_own": _mutual(own),
        "u_mutual_base": _mutual(below),
        "u_cosine": _cosine(own, ours),
        "u_cosine_ensemble": _cosine(together, ours),
        "u_cosine_base_own": _cosine(own, below),
    }  # fmt: skip


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _at(probabilities: Tensor, picked: Tensor) -> Tensor:
    return probabilities.gather(1, picked[:, None])[:, 0]


def _ratio(reference: Tensor, mine: Tensor, theirs: Tensor) -> float:
    return _mean(_at(reference, mine)) / max(_mean(_at(reference, theirs)), 1e-9)


def _entropy(logs: Tensor) -> float:
    return _mean(-(logs.exp() * logs).sum(-1)) / log(logs.shape[-1])


def _mutual(logs: Tensor) -> float:
    mean = logs.exp().mean(0)
    return float(-(mean * mean.clamp(min=1e-300).log()).sum()) / log(logs.shape[-1]) - _entropy(
        logs
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    centred = [each - each.mean(-1, keepdim=True) for each in (one, other)]
    return _mean(torch.cosine_similarity(*centred, dim=-1))
