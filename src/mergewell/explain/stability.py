"""Stability: what do experts and their combinations answer when weights grow, shrink or shake?

Two curves. Magnitude: every parameter of some experts is multiplied by c before they are combined;
of a bias-free ReLU network of depth L the logits then grow by c^L and no answer changes. Noise:
Gaussian noise of r times each tensor's standard deviation is added to the combined model itself.

Source: Wang et al. 2024, arXiv:2411.09263; papers.md 3.4 and 3.6. Departures: running statistics
of BatchNorm are not scaled (they are no parameters, and scaling them breaks the invariance by
itself); they are used as stored, or re-estimated after the change. The noise curve is ours.

Shapes: K experts, N samples, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergewell.explain.averaging import BatchNorm
from mergewell.explain.split import Head, Outputs, find_classifier, run_split, soup
from mergewell.labelled import LabelledInputs
from mergewell.models.batch_norm import batch_norms, reestimate
from mergewell.tensor_group import random_key

Subject = Literal[
    "single", "soup", "logit_ensemble", "feature_ensemble_mean_head", "feature_ensemble_first_head"
]
"""What is judged: the first expert, or a combination of all."""

Which = Literal["all", "first", "last", "all_but_last"]
"""Whose parameters are scaled."""

FACTORS = (0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0)
"""Factors of the magnitude curve (papers.md 3.6)."""

NOISES = (0.01, 0.03, 0.1, 0.2, 0.5)
"""Noise relative to each tensor's standard deviation."""

_BINS = 15


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a curve."""

    curve: Literal["magnitude", "noise"]
    subject: Subject
    which: Which
    amount: float
    """The factor c, or the relative noise r."""
    batch_norm: BatchNorm
    accuracy: float | None
    """None without labels."""
    agreement: float
    """Fraction of the samples with the answer of the same subject unchanged."""
    calibration_error: float | None
    """Expected calibration error, 15 bins of equal width; None without labels."""
    logit_scale: float | None
    """Root mean square of the centred logits, relative to the subject unchanged."""
    finite: float
    """Fraction of the samples whose logits are finite; the others count as wrong."""


@dataclass(frozen=True, slots=True)
class Stability:
    """The result of `measure_stability`."""

    points: tuple[Point, ...]
    seed: int
    draws: int
    """Draws of noise that each point of the noise curve is the mean of."""

    def curve(
        self,
        curve: Literal["magnitude", "noise"],
        subject: Subject,
        which: Which = "all",
        batch_norm: BatchNorm | None = None,
    ) -> tuple[Point, ...]:
        """Return the points of one curve in their order."""
        return tuple(
            point
            for point in self.points
            if (point.curve, point.subject, point.which) == (curve, subject, which)
            and batch_norm in (None, point.batch_norm)
        )

    def as_data(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        points = [asdict(point) for point in self.points]
        return {"seed": self.seed, "draws": self.draws, "points": points}


def measure_stability(
    experts: Sequence[nn.Module],
    data: LabelledInputs,
    *,
    factors: Sequence[float] = FACTORS,
    noises: Sequence[float] = NOISES,
    classifier: str | None = None,
    measuring: LabelledInputs | None = None,
    seed: int = 0,
    draws: int = 3,
) -> Stability:
    """Return magnitude and noise curves of the first expert and of all combinations.

    Where the modules have BatchNorms, every point is measured with the statistics as stored and
    with statistics re-estimated, after the change, on the inputs of `measuring` (or of `data`).

    Raises:
        ModelError: a module cannot be split into features and a classifier.
        DataError: data that do not fit the modules.
    """
    layer = find_classifier(experts[0], data.batches[0], name=classifier)
    kinds: tuple[BatchNorm, ...] = (
        ("stored", "reestimated") if batch_norms(experts[0]) else ("none",)
    )
    points: list[Point] = []
    for kind in kinds:
        work = _Work(experts, data, measuring or data, layer, kind)
        unchanged = work.subjects(1.0, "all")
        for which in _whiches(len(experts)):
            for factor in factors:
                made = work.subjects(factor, which)
                for subject, logits in made.items():
                    if subject != "single" or which == "all":
                        found = _measured(logits, unchanged[subject], data.labels)
                        points.append(Point("magnitude", subject, which, factor, kind, *found))
        for noise in noises:
            many = [work.noisy(noise, seed + draw) for draw in range(draws)]
            for subject in many[0]:
                each = [_measured(one[subject], unchanged[subject], data.labels) for one in many]
                mean = [_mean(column) for column in zip(*each, strict=True)]
                agreement, finite = mean[1] or 0.0, mean[4] or 0.0
                points.append(
                    Point("noise", subject, "all", noise, kind, mean[0], agreement, mean[2],
                          mean[3], finite)
                )  # fmt: skip
    return Stability(tuple(points), seed, draws)


def scaled(module: nn.Module, factor: float) -> nn.Module:
    """Return a copy of a module with every parameter, and no buffer, multiplied by `factor`."""
    return _changed(module, lambda _name, tensor: tensor * factor)


def shaken(module: nn.Module, noise: float, *, seed: int) -> nn.Module:
    """Return a copy with Gaussian noise of `noise` times each parameter's standard deviation.

    The noise depends on the seed and the parameter's name and shape alone. Parameters of one
    element, or all of one value, have no deviation and stay as they are.
    """

    def shake(name: str, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(random_key(seed, name, 0))
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
        spread = tensor.std(correction=0) if tensor.numel() > 1 else 0.0
        return tensor + noise * spread * drawn

    return _changed(module, shake)


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = _BINS) -> float:
    """Return the expected calibration error of logits [N, C], by bins of equal width.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    confidence, answers = logits.double().softmax(-1).max(-1)
    right = (answers == labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(labels))


@dataclass(frozen=True, slots=True)
class _Work:
    """What making subjects takes."""

    experts: Sequence[nn.Module]
    data: LabelledInputs
    measuring: LabelledInputs
    classifier: str
    kind: BatchNorm
    seen: dict[tuple[int, float], Outputs] = field(default_factory=dict[tuple[int, float], Outputs])
    """Outputs of each expert by the factor that scales it."""

    def subjects(self, factor: float, which: Which) -> dict[Subject, Tensor]:
        """Return the logits of every subject once some experts are scaled."""
        chosen = _chosen(which, len(self.experts))
        factors = [factor if place in chosen else 1.0 for place in range(len(self.experts))]
        own: list[Outputs] = []
        for key in enumerate(factors):
            if key not in self.seen:
                self.seen[key] = self.run(scaled(self.experts[key[0]], key[1]))
            own.append(self.seen[key])
        pairs = zip(self.experts, factors, strict=True)
        return self.combined(own, soup([scaled(expert, factor) for expert, factor in pairs]))

    def noisy(self, noise: float, seed: int) -> dict[Subject, Tensor]:
        """Return the logits of every subject, each with noise on the weights it runs."""
        models = [
            shaken(e, noise, seed=seed + 1000 * place) for place, e in enumerate(self.experts)
        ]
        merged = shaken(soup(self.experts), noise, seed=seed)
        return self.combined([self.run(model) for model in models], merged)

    def combined(self, own: Sequence[Outputs], merged: nn.Module) -> dict[Subject, Tensor]:
        """Return the logits of every subject made of these outputs and this soup."""
        features = torch.stack([one.features for one in own]).mean(0)
        head = Head(
            torch.stack([one.head.weight for one in own]).mean(0),
            torch.stack([one.head.bias for one in own]).mean(0),
        )
        if len(own) == 1:
            return {"single": own[0].logits}
        return {
            "single": own[0].logits,
            "soup": self.run(merged).logits,
            "logit_ensemble": torch.stack([one.logits for one in own]).mean(0),
            "feature_ensemble_mean_head": head(features),
            "feature_ensemble_first_head": own[0].head(features),
        }

    def run(self, model: nn.Module) -> Outputs:
        if self.kind == "reestimated":
            model = copy.deepcopy(model)
            reestimate(model, self.measuring.batches)
        return run_split(model, self.classifier, self.data.batches)


def _changed(module: nn.Module, change: Callable[[str, Tensor], Tensor]) -> nn.Module:
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(change(name, parameter))
    return fresh


def _whiches(experts: int) -> tuple[Which, ...]:
    if experts == 1:
        return ("all",)
    return ("all", "first", "last") if experts == 2 else ("all", "first", "last", "all_but_last")


def _chosen(which: Which, experts: int) -> Sequence[int]:
    places: Mapping[Which, Sequence[int]] = {
        "all": range(experts),
        "first": (0,),
        "last": (experts - 1,),
        "all_but_last": range(experts - 1),
    }
    return places[which]


_Found = tuple[float | None, float, float | None, float | None, float]


def _measured(logits: Tensor, unchanged: Tensor, labels: Tensor | None) -> _Found:
    """Return accuracy, agreement, calibration error, logit scale and what is finite."""
    finite = logits.isfinite().all(-1)
    answers = torch.where(finite, logits.argmax(-1), -1)
    agreement = float((answers == unchanged.argmax(-1)).double().mean())
    size = _size(unchanged)
    scale = _size(logits[finite]) / size if bool(finite.any()) and size > 0 else None
    share = float(finite.double().mean())
    if labels is None:
        return None, agreement, None, scale, share
    right = float((answers == labels).double().mean())
    error = calibration_error(logits[finite], labels[finite]) if bool(finite.any()) else None
    return right, agreement, error, scale, share


def _size(logits: Tensor) -> float:
    return float((logits - logits.mean(-1, keepdim=True)).square().mean().sqrt())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
