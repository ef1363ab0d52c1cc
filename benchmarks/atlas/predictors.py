"""Every predictor of a merge, at three budgets: w_ weights, u_ with 16 inputs a task, l_ labelled.

Diagnostics of the package give what they give a user; the rest compares the merge with each of its
experts. Matrices of pairs become mean, least and largest, numbers an expert stand one by one too.

Shapes: K experts, M = K + 1 with the base first, N samples of all tasks, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from family import Family, State
from torch import Tensor
from torch.nn import functional

from mergewell.diagnostics.base import DIAGNOSTICS, Evidence
from mergewell.prediction.answers import answers
from mergewell.prediction.lie import Each, Numbers, lie, products
from mergewell.prediction.look import Seen
from mergewell.prediction.resemblance import resemblance
from mergewell.statistics.subspaces import EXACT, MatrixSubspaces, alignment, decompose

BUDGET = {
    "task_vectors": "w", "sign_conflict": "w", "norm_dispersion": "w", "subspace_alignment": "w",
    "task_interference": "w", "kinship": "w", "m_loss": "u", "output_gap": "u", "cka": "u",
    "linear_connectivity": "u", "representation_bias": "u", "gradient_distance": "u",
    "cross_task_accuracy": "l", "barrier": "l",
}  # fmt: skip
"""What a diagnostic of the package needs. Gradients are also taken by labels, under `l`."""


def diagnosed(evidence: Evidence, *, only: Sequence[str] = (), budget: str = "") -> Numbers:
    """Return the predictors of the package's diagnostics as single numbers."""
    found: Numbers = {}
    for name in only or DIAGNOSTICS.names():
        finding = DIAGNOSTICS.build(name, {}).measure(evidence)
        if finding is not None:
            for key, value in finding.predictors.items():
                found |= flat(f"{budget or BUDGET[name]}_{key}", value)
    return found


def flat(name: str, value: Any) -> Numbers:
    """Return a number as it is; of a matrix of pairs or numbers by expert mean, least, largest."""
    if isinstance(value, int | float):
        return {name: float(value)}
    if isinstance(value, Mapping):
        return spread(name, [float(one) for one in value.values()])
    matrix = np.array([[np.nan if v is None else v for v in row] for row in value], float)
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    return spread(name, [float(one) for one in off])


def spread(name: str, values: Sequence[float]) -> Numbers:
    """Return mean, least and largest of the numbers that are defined."""
    held = np.array([v for v in values if v == v], float)
    if not len(held):
        return {}
    return {
        f"{name}_mean": float(held.mean()),
        f"{name}_min": float(held.min()),
        f"{name}_max": float(held.max()),
    }


def spreads(each: Each) -> Numbers:
    """Return mean, least and largest over experts of every predictor."""
    return {k: v for name, values in each.items() for k, v in spread(name, values).items()}


def by_weights(
    base: State,
    experts: Sequence[State],
    merged: Mapping[str, Tensor],
    subspaces: Mapping[str, MatrixSubspaces],
) -> tuple[Numbers, Each]:
    """Return how the merged task vector lies to each expert's: `lie`, and subspace alignment.

    w_sar is the alignment with the sum, w_sar_merged with the merge as it is (arXiv:2502.04959).
    """
    numbers, each = lie(products(base, experts, merged))
    aligned = [
        _alignment(base[name], [state[name] for state in experts], merged[name])
        for name in subspaces
        if name in merged
    ]
    if aligned:
        count = len(experts)
        each["w_sar_merged"] = torch.stack(aligned).nanmean(0).tolist()
        sums = torch.stack([m.alignment for m in subspaces.values()])
        each["w_sar"] = sums.nanmean(0).tolist()
        pairs = torch.stack([m.pairs for m in subspaces.values()]).nanmean(0)
        off = ~torch.eye(count, dtype=torch.bool)
        each["w_sar_by_others"] = [float(pairs[i][off[i]].nanmean()) for i in range(count)]
    return numbers, each


def _alignment(base: Tensor, experts: Sequence[Tensor], merged: Tensor) -> Tensor:
    """Return the share of each task matrix in the merged one's leading left subspace, [K]."""
    rows = len(base)
    dtype = torch.float64 if min(rows, base.numel() // rows) <= EXACT else torch.float32
    below = base.to(dtype).reshape(rows, -1)
    change = merged.to(dtype).reshape(rows, -1) - below
    if not bool(change.any()):
        return torch.zeros(len(experts), dtype=torch.float64)
    factors = decompose(change, seed=0)
    span = factors.left[:, : factors.rank()].to(dtype)
    matrices = [expert.to(dtype).reshape(rows, -1) - below for expert in experts]
    found = [alignment(m, span, norm=float(m.square().sum()) ** 0.5) for m in matrices]
    return torch.tensor(found, dtype=torch.float64)


def by_inputs(
    family: Family, heads: Sequence[Tensor], own: Sequence[Sequence[Seen]], merged: Sequence[Seen]
) -> tuple[Numbers, Each]:
    """Return how the merge answers each task's 16 inputs beside the task's own expert.

    `own[k][j]` is what model k (the base first, then the experts) made of the inputs of expert j's
    task, `merged[j]` what the merge made of them.
    """
    each: Each = {}
    for j, head in enumerate(heads):
        models = [*(seen[j] for seen in own), merged[j]]
        base, *experts, ours = [family.logits(_whole(one), head) for one in models]
        found = answers(base, experts, ours, expert=j) | resemblance(
            [one.last for one in models], [one.middle for one in models], experts, expert=j
        )
        for name, value in found.items():
            each.setdefault(name, []).append(value)
    return {}, each


def by_labels(
    family: Family,
    heads: Sequence[Tensor],
    labels: Sequence[Tensor],
    own: Sequence[Sequence[Seen]],
    merged: Sequence[Seen],
) -> tuple[Tensor, Tensor, Each]:
    """Return accuracies on 16 inputs, [K, K] expert by task and the base's [K], and what follows.

    l_right, l_loss: accuracy and cross-entropy of the merge on 16 labelled inputs; l_retention:
    its accuracy over that of the own expert.
    """
    count = len(heads)
    hits = torch.zeros(count + 1, count, dtype=torch.float64)
    each: Each = {"l_right": [], "l_loss": [], "l_retention": [], "l_loss_rise": []}
    for j, head in enumerate(heads):
        for k in range(count + 1):
            said = family.logits(_whole(own[k][j]), head).argmax(-1)
            hits[k, j] = float((said == labels[j]).double().mean())
        logits = family.logits(_whole(merged[j]), head)
        loss = float(functional.cross_entropy(logits, labels[j]))
        theirs = functional.cross_entropy(family.logits(_whole(own[j + 1][j]), head), labels[j])
        right = float((logits.argmax(-1) == labels[j]).double().mean())
        each["l_right"].append(right)
        each["l_loss"].append(loss)
        each["l_loss_rise"].append(loss - float(theirs))
        each["l_retention"].append(right / max(float(hits[j + 1, j]), 1 / 16))
    return hits[1:], hits[0], each


def gradient_pairs(vectors: Sequence[Tensor], name: str) -> Numbers:
    """Return distance, cosine, product and relative distance of vectors, over pairs."""
    found: dict[str, list[float]] = {"l2": [], "cosine": [], "dot": [], "relative": []}
    for i, one in enumerate(vectors):
        for other in vectors[:i]:
            dot, left, right = (float(a @ b) for a, b in ((one, other), (one, one), (other, other)))
            far = max(0.0, left + right - 2 * dot) ** 0.5
            found["l2"].append(far)
            found["dot"].append(dot)
            found["cosine"].append(dot / max(left * right, 1e-30) ** 0.5)
            found["relative"].append(far / max(left + right, 1e-30) ** 0.5)
    return {k: v for key, vs in found.items() for k, v in spread(f"{name}_{key}", vs).items()}


def _whole(seen: Seen) -> Tensor:
    return torch.cat(seen.outputs)
