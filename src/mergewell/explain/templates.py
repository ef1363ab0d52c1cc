"""Templates: do the rows of a linear classifier look like class means, and still after merging?

At a stationary point of softmax regression with strong weight decay the rows are the class means,
centred, up to scale; so the average of two such classifiers is the template of both data sets. The
same holds for the last layer of a deep network on its features (neural collapse).

Source: Wang et al. 2024, arXiv:2411.09263, section on weight patterns; papers.md 3.2.3, 3.2.4.
Departures: the paper compares by eye; cosines, retrieval, smoothness and retention are ours.

Shapes: N samples, I features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergewell.errors import DataError
from mergewell.explain.split import Head, Outputs


@dataclass(frozen=True, slots=True)
class Match:
    """How well rows match class means; classes without samples are left out."""

    cosine: Mapping[int, float]
    """By class: between the centred row and the centred class mean."""
    top1: float
    """Fraction of rows that are nearest, by cosine, to their own class's mean."""
    top5: float

    @property
    def mean_cosine(self) -> float:
        """Mean over the classes."""
        return sum(self.cosine.values()) / len(self.cosine)

    def as_data(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "cosine": {str(label): value for label, value in self.cosine.items()},
            "mean_cosine": self.mean_cosine,
            "top1": self.top1,
            "top5": self.top5,
        }


@dataclass(frozen=True, slots=True)
class Templates:
    """The result of `compare_templates`."""

    experts: Mapping[str, Match]
    """Each expert's rows against the class means of its own features."""
    merged: Match
    """The merged rows against the class means of the merged model's features."""
    to_parents: Mapping[str, Match]
    """The merged rows against the class means of each expert's features."""
    retention: Mapping[str, float]
    """Mean over classes of cos(merged row, expert's mean) / cos(expert's row, expert's mean)."""

    def as_data(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "experts": {name: match.as_data() for name, match in self.experts.items()},
            "merged": self.merged.as_data(),
            "to_parents": {name: match.as_data() for name, match in self.to_parents.items()},
            "retention": dict(self.retention),
        }


def compare_templates(
    experts: Mapping[str, Outputs], merged: Outputs, labels: Tensor | Mapping[str, Tensor]
) -> Templates:
    """Return how experts' and merged rows match class means of features.

    `labels` [N] are of the samples that all were run on; by expert where each has its own data (the
    merged model's features are then judged by the first expert's).

    Raises:
        DataError: fewer than two classes among the labels.
    """
    by_expert = {name: labels if isinstance(labels, Tensor) else labels[name] for name in experts}
    first = next(iter(by_expert.values()))
    means = {name: class_means(one.features, by_expert[name]) for name, one in experts.items()}
    own = {name: match_rows(one.head, means[name]) for name, one in experts.items()}
    to_parents = {name: match_rows(merged.head, means[name]) for name in experts}
    return Templates(
        own,
        match_rows(merged.head, class_means(merged.features, first)),
        to_parents,
        {name: _retention(to_parents[name], own[name]) for name in experts},
    )


def class_means(features: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Return the mean feature [I] of every class among the labels [N], in float64.

    Raises:
        DataError: fewer than two classes.
    """
    classes: list[int] = sorted({int(label) for label in labels})
    if len(classes) < 2:
        raise DataError(
            f"Templates need samples of two classes or more, but there are {len(classes)}; give "
            "more data."
        )
    return {label: features[labels == label].double().mean(0) for label in classes}


def match_rows(head: Head, means: Mapping[int, Tensor]) -> Match:
    """Return how the rows of a head match class means, both centred over the classes present.

    Raises:
        DataError: a class that the head has no row for.
    """
    classes = list(means)
    if classes[-1] >= len(head.weight):
        raise DataError(
            f"There is a label {classes[-1]} but the classifier has {len(head.weight)} rows; use "
            "labels and experts that belong together."
        )
    rows = _centred(head.weight[classes].double())
    targets = _centred(torch.stack([means[label].double() for label in classes]))
    cosines = _unit(rows) @ _unit(targets).T
    own = cosines.diagonal()
    rank = (cosines > own[:, None]).sum(1)
    return Match(
        {label: float(cosine) for label, cosine in zip(classes, own, strict=True)},
        float((rank < 1).double().mean()),
        float((rank < 5).double().mean()),
    )


def channel_correlations(row: Tensor, mean: Tensor, *, shape: Sequence[int]) -> list[float]:
    """Return the Pearson correlation of a row and a class mean image in each channel.

    row and mean: [I]; shape: (channels, height, width) with I elements.
    """
    left, right = (_centred_rows(each.double().reshape(shape[0], -1)) for each in (row, mean))
    return [float(product) for product in (_unit(left) * _unit(right)).sum(1)]


def smoothness(row: Tensor, *, shape: Sequence[int]) -> float:
    """Return the share of an image's power in the lower half of its spatial frequencies.

    A picture-like template has nearly all of it there, white noise about 0.2 (the disc's area).
    row: [I]; shape: (channels, height, width). Channels are centred first.
    """
    image = _centred_rows(row.double().reshape(shape[0], -1)).reshape(*shape)
    fourier: Any = torch.fft
    power: Tensor = fourier.fft2(image).abs().square().sum(0)
    vertical: Tensor = fourier.fftfreq(shape[1])
    horizontal: Tensor = fourier.fftfreq(shape[2])
    radius = (vertical[:, None].square() + horizontal.square()).sqrt()
    total = power.sum()
    return float(power[radius <= 0.25].sum() / total) if float(total) > 0 else 0.0


def _retention(merged: Match, own: Match) -> float:
    ratios = [merged.cosine[c] / own.cosine[c] for c in own.cosine if own.cosine[c] != 0]
    return sum(ratios) / len(ratios) if ratios else 0.0


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def _centred_rows(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.square().sum(1, keepdim=True).sqrt()
    return rows / torch.where(norms > 0, norms, 1.0)
