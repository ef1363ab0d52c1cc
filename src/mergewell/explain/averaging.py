"""Averaging: weights, features or logits? Eight ways to combine experts, judged side by side.

And why they differ: with experts' features h_j and classifiers (W_j, b_j), the logit ensemble minus
the logits of the uniform soup is

    [mean_j W_j h_j - mean(W) mean(h)]  +  mean(W) [mean(h) - h_soup]
          classifier covariance                nonlinearity gap

an identity. The first part is mean_j (W_j - mean(W)) (h_j - mean(h)); heads that were made at
random apart make it large. The second is what M-Loss measures layer by layer.

Source: Wang et al. 2024, "Rethinking weight-averaged model-merging", arXiv:2411.09263; papers.md
3.3.2 and 3.3.3. Departures, each a defect of the released scripts (papers.md 3.5): every model is
run in eval mode; no model is compared with itself; a soup is the plain mean of what it accepted.

Shapes: K experts, N samples, I features, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mergewell.errors import RecipeError
from mergewell.evaluate import Estimate, estimate, resampled_means
from mergewell.explain.split import Head, Outputs, find_classifier, run_split, soup
from mergewell.labelled import LabelledInputs, accuracy
from mergewell.learners.ops import best_first, greedy_selection
from mergewell.models.batch_norm import batch_norms, reestimate

BatchNorm = Literal["none", "stored", "reestimated"]
"""Which statistics a model's BatchNorms use; "none": it has no BatchNorm."""

Way = Literal[
    "single",
    "uniform_soup",
    "logit_ensemble",
    "feature_ensemble_first_head",
    "feature_ensemble_mean_head",
    "greedy_soup",
    "greedy_soup_in_order",
    "selected_logit_ensemble",
    "selected_feature_ensemble",
]
"""The eight ways of papers.md 3.3.2 (ids 1, 2, 7, 8, 9, 10, 16, 18; the last makes two rows)."""


_Row = tuple[Way, tuple[int, ...], BatchNorm, Tensor]  # the tensor holds the logits


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to combine experts, and what came of it."""

    way: Way
    members: tuple[str, ...]
    batch_norm: BatchNorm
    accuracy: Estimate | None
    """Fraction of right answers; None without labels."""
    agreement: Estimate
    """Fraction of the samples on which the answer is the logit ensemble's."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The parts of (logit ensemble - soup), each as a fraction of the ensemble's logit norm."""

    batch_norm: BatchNorm
    difference: float
    covariance: float
    """Classifier covariance."""
    nonlinearity: float
    """Nonlinearity gap, seen through the mean classifier."""
    cosine: float
    """Between the two parts: below 0 they cancel."""
    residual: float
    """What the identity leaves over: rounding."""


@dataclass(frozen=True, slots=True)
class Averaging:
    """The result of `compare_averaging`."""

    classifier: str
    variants: tuple[Variant, ...]
    decompositions: tuple[Decomposition, ...]
    left_out: Mapping[str, str]
    """Ways that could not be tried, with the reason."""

    def of(self, way: Way, batch_norm: BatchNorm | None = None) -> Variant:
        """Return the first variant of a way; KeyError if it was left out."""
        for variant in self.variants:
            if variant.way == way and batch_norm in (None, variant.batch_norm):
                return variant
        raise KeyError(way)

    def as_data(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "classifier": self.classifier,
            "variants": [
                {
                    "way": variant.way,
                    "members": list(variant.members),
                    "batch_norm": variant.batch_norm,
                    "accuracy": _told(variant.accuracy),
                    "agreement": _told(variant.agreement),
                }
                for variant in self.variants
            ],
            "decompositions": [
                {
                    "batch_norm": part.batch_norm,
                    "difference": part.difference,
                    "covariance": part.covariance,
                    "nonlinearity": part.nonlinearity,
                    "cosine": part.cosine,
                    "residual": part.residual,
                }
                for part in self.decompositions
            ],
            "left_out": dict(self.left_out),
        }


def compare_averaging(
    experts: Mapping[str, nn.Module],
    data: LabelledInputs,
    *,
    choosing: LabelledInputs | None = None,
    classifier: str | None = None,
    seed: int = 0,
) -> Averaging:
    """Return all ways to combine the experts, judged on `data`, and the decomposition.

    Greedy soups are chosen on `choosing`, which needs labels and should not share samples with
    `data`; where there are BatchNorms, by soups with re-estimated ones. BatchNorm statistics are
    re-estimated on the inputs of `choosing`, or of `data` without it. Intervals are paired
    bootstraps over the samples.

    Raises:
        RecipeError: no experts.
        ModelError: a module cannot be split into features and a classifier.
        DataError: data that do not fit the modules.
    """
    if not experts:
        raise RecipeError("There are no experts to compare; name at least one.")
    names, modules = tuple(experts), list(experts.values())
    layer = find_classifier(modules[0], data.batches[0], name=classifier)
    own = [run_split(module, layer, data.batches) for module in modules]
    work = _Work(names, modules, data, choosing or data, layer)
    kind: BatchNorm = work.stored
    everyone = tuple(range(len(names)))
    rows: list[_Row] = []
    for place, one in enumerate(own):
        rows.append(("single", (place,), kind, one.logits))
    if work.has_norms:
        for place, module in enumerate(modules):
            repaired = run_split(work.repaired(module), layer, data.batches)
            rows.append(("single", (place,), "reestimated", repaired.logits))
    uniform = work.soups(everyone)
    for each, made in uniform.items():
        rows.append(("uniform_soup", everyone, each, made.logits))
    rows.append(("logit_ensemble", everyone, kind, _mean_logits(own)))
    features = torch.stack([one.features for one in own]).mean(0)
    rows.append(("feature_ensemble_first_head", everyone, kind, own[0].head(features)))
    rows.append(("feature_ensemble_mean_head", everyone, kind, _mean_head(own)(features)))
    left_out: dict[str, str] = {}
    if choosing is None or choosing.labels is None:
        reason = "needs labelled samples to choose on"
        greedy: tuple[Way, ...] = (
            "greedy_soup", "greedy_soup_in_order", "selected_logit_ensemble",
            "selected_feature_ensemble",
        )  # fmt: skip
        left_out = dict.fromkeys(greedy, reason)
    else:
        rows += _greedy(work, own, choosing)
    return Averaging(
        layer,
        _judged(rows, names, data.labels, _mean_logits(own), seed),
        tuple(decompose(own, made, each) for each, made in uniform.items()),
        left_out,
    )


def decompose(
    experts: Sequence[Outputs], merged: Outputs, batch_norm: BatchNorm = "none"
) -> Decomposition:
    """Return the parts of the difference between the logit ensemble and a uniform soup."""
    head = _mean_head(experts)
    mean = torch.stack([one.features for one in experts]).mean(0)
    covariance = torch.stack(
        [(one.features - mean) @ (one.head.weight - head.weight).T for one in experts]
    ).mean(0)
    nonlinearity = (mean - merged.features) @ head.weight.T
    ensemble = _mean_logits(experts)
    difference = ensemble - merged.logits
    whole = _norm(ensemble)
    sizes = [_norm(part) for part in (difference, covariance, nonlinearity)]
    left = _norm(difference - covariance - nonlinearity)
    product = float((covariance * nonlinearity).sum())
    cosine = product / (sizes[1] * sizes[2]) if sizes[1] * sizes[2] > 0 else 0.0
    scaled = [size / whole if whole > 0 else 0.0 for size in (*sizes, left)]
    return Decomposition(batch_norm, scaled[0], scaled[1], scaled[2], cosine, scaled[3])


@dataclass(frozen=True, slots=True)
class _Work:
    """What making soups takes."""

    names: tuple[str, ...]
    modules: Sequence[nn.Module]
    data: LabelledInputs
    measuring: LabelledInputs
    classifier: str

    @property
    def has_norms(self) -> bool:
        return bool(batch_norms(self.modules[0]))

    @property
    def stored(self) -> BatchNorm:
        return "stored" if self.has_norms else "none"

    def repaired(self, module: nn.Module) -> nn.Module:
        fresh = copy.deepcopy(module)
        reestimate(fresh, self.measuring.batches)
        return fresh

    def soup(self, members: Sequence[int]) -> nn.Module:
        return soup([self.modules[place] for place in members])

    def soups(self, members: Sequence[int]) -> dict[BatchNorm, Outputs]:
        """Return the outputs of a soup, and of the same with re-estimated BatchNorms."""
        merged = self.soup(members)
        made: dict[BatchNorm, Outputs] = {
            self.stored: run_split(merged, self.classifier, self.data.batches)
        }
        if self.has_norms:
            fresh = self.repaired(merged)
            made["reestimated"] = run_split(fresh, self.classifier, self.data.batches)
        return made


def _greedy(work: _Work, own: Sequence[Outputs], choosing: LabelledInputs) -> list[_Row]:
    """Return the two greedy soups and the two ensembles of those that the first one chose."""
    scores = [accuracy(module, choosing) for module in work.modules]

    def judge(members: tuple[int, ...]) -> float:
        merged = work.soup(members)
        return accuracy(work.repaired(merged) if work.has_norms else merged, choosing)

    rows: list[_Row] = []
    order = best_first(scores)
    kept, _ = greedy_selection(order, judge, first=judge(order[:1]))
    in_order, _ = greedy_selection(range(len(scores)), judge, first=judge((0,)))
    ways: tuple[tuple[Way, tuple[int, ...]], ...] = (
        ("greedy_soup", kept),
        ("greedy_soup_in_order", in_order),
    )
    for way, members in ways:
        for each, made in work.soups(members).items():
            rows.append((way, members, each, made.logits))
    chosen = [own[place] for place in kept]
    features = torch.stack([one.features for one in chosen]).mean(0)
    rows.append(("selected_logit_ensemble", kept, work.stored, _mean_logits(chosen)))
    rows.append(("selected_feature_ensemble", kept, work.stored, _mean_head(chosen)(features)))
    return rows


def _judged(
    rows: Sequence[_Row],
    names: Sequence[str],
    labels: Tensor | None,
    ensemble: Tensor,
    seed: int,
) -> tuple[Variant, ...]:
    answers = torch.stack([logits.argmax(-1).cpu() for *_, logits in rows])
    agreed = (answers == ensemble.argmax(-1).cpu()).double()
    scores = agreed[None] if labels is None else torch.stack([agreed, (answers == labels).double()])
    values = scores.mean(-1).numpy()
    draws = resampled_means(np.asarray(scores.numpy(), dtype=np.float64), seed=seed)
    return tuple(
        Variant(
            way,
            tuple(names[place] for place in members),
            batch_norm,
            None if labels is None else estimate(values[1, row], draws[:, 1, row]),
            estimate(values[0, row], draws[:, 0, row]),
        )
        for row, (way, members, batch_norm, _) in enumerate(rows)
    )


def _mean_logits(experts: Sequence[Outputs]) -> Tensor:
    return torch.stack([one.logits for one in experts]).mean(0)


def _mean_head(experts: Sequence[Outputs]) -> Head:
    return Head(
        torch.stack([one.head.weight for one in experts]).mean(0),
        torch.stack([one.head.bias for one in experts]).mean(0),
    )


def _norm(tensor: Tensor) -> float:
    return float(tensor.square().sum().sqrt())


def _told(value: Estimate | None) -> dict[str, float] | None:
    return value and {"value": value.value, "low": value.low, "high": value.high}
