"""Rows against class means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergewell.errors import DataError
from mergewell.explain.split import Head, Outputs, run_split, soup
from mergewell.explain.templates import (
    channel_correlations,
    class_means,
    compare_templates,
    match_rows,
    smoothness,
)
from mergewell.labelled import LabelledInputs


def outputs(rows: list[list[float]], features: list[list[float]]) -> Outputs:
    weight = torch.tensor(rows, dtype=torch.float64)
    head = Head(weight, torch.zeros(len(weight), dtype=torch.float64))
    given = torch.tensor(features, dtype=torch.float64)
    return Outputs(given, head(given), head)


FEATURES = [[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
LABELS = torch.tensor([0, 0, 1, 1])


def test_class_means_by_hand() -> None:
    means = class_means(torch.tensor(FEATURES), LABELS)
    assert {label: mean.tolist() for label, mean in means.items()} == {0: [2.0, 0.0], 1: [0.0, 2.0]}


def test_rows_that_are_the_class_means_match_fully_whatever_is_added() -> None:
    means = {0: torch.tensor([2.0, 0.0]), 1: torch.tensor([0.0, 2.0])}
    one = outputs([[12.0, 5.0], [10.0, 7.0]], FEATURES)  # 1 * mean + (10, 5)
    match = match_rows(one.head, means)
    assert match.mean_cosine == pytest.approx(1.0)
    assert (match.top1, match.top5) == (1.0, 1.0)


def test_exchanged_rows_match_the_other_class() -> None:
    match = compare_templates(
        {"a": outputs([[0.0, 1.0], [1.0, 0.0]], FEATURES)},
        outputs([[1.0, 0.0], [0.0, 1.0]], FEATURES),
        LABELS,
    )
    assert match.experts["a"].mean_cosine == pytest.approx(-1.0)
    assert (match.experts["a"].top1, match.experts["a"].top5) == (0.0, 1.0)
    assert match.merged.top1 == 1.0
    assert match.retention["a"] == pytest.approx(-1.0)


def test_retention_by_hand() -> None:
    """The merged rows stand at 45 degrees to the class means, the expert's along them."""
    found = compare_templates(
        {"a": outputs([[1.0, -1.0], [-1.0, 1.0]], FEATURES)},
        outputs([[1.0, 0.0], [-1.0, 0.0]], FEATURES),
        LABELS,
    )
    assert found.to_parents["a"].mean_cosine == pytest.approx(0.5**0.5)
    assert found.retention["a"] == pytest.approx(0.5**0.5)


def test_a_linear_model_with_strong_decay_learns_templates_and_keeps_them_merged() -> None:
    """papers.md 3.2.3: the stationary rows are the centred class means."""

    def train(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
        labels = torch.randint(4, (400,), generator=generator)
        inputs = means[labels] + torch.randn(400, 20, generator=generator)
        module = nn.Sequential(nn.Linear(20, 4))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=1.0)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), labels).backward()
            optimizer.step()
        return module, inputs, labels

    torch.manual_seed(0)
    (one, inputs, labels), (two, _, _) = train(1), train(2)
    own = {name: run_split(m, "0", [inputs]) for name, m in (("one", one), ("two", two))}
    found = compare_templates(own, run_split(soup([one, two]), "0", [inputs]), labels)
    assert found.experts["one"].mean_cosine > 0.95
    assert found.experts["one"].top1 == 1.0
    assert found.retention["one"] == pytest.approx(1.0, abs=0.05)


def test_deep_networks_are_judged_on_their_features(
    experts: dict[str, nn.Module], data: LabelledInputs
) -> None:
    assert data.labels is not None
    from mergewell.explain.split import find_classifier

    layer = find_classifier(experts["expert 1"], data.batches[0])
    own = {name: run_split(module, layer, data.batches) for name, module in experts.items()}
    merged = run_split(soup(list(experts.values())), layer, data.batches)
    found = compare_templates(own, merged, data.labels)
    assert all(match.mean_cosine > 0.3 for match in found.experts.values())
    assert set(found.as_data()["retention"]) == set(experts)


def test_channel_correlation_and_smoothness() -> None:
    ramp = torch.linspace(-1, 1, 8).repeat(8, 1)
    noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    row, mean = torch.stack([ramp, noise]).flatten(), torch.stack([2 * ramp + 5, -noise]).flatten()
    assert channel_correlations(row, mean, shape=(2, 8, 8)) == pytest.approx([1.0, -1.0])
    assert smoothness(ramp.flatten(), shape=(1, 8, 8)) > 0.7
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert smoothness(checkers.float().flatten(), shape=(1, 8, 8)) == 0.0
    assert smoothness(torch.zeros(64), shape=(1, 8, 8)) == 0.0


def test_mistakes_are_refused() -> None:
    with pytest.raises(DataError, match="two classes or more, but there are 1"):
        class_means(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
    means = {0: torch.zeros(2), 5: torch.zeros(2)}
    with pytest.raises(DataError, match="a label 5 but the classifier has 2 rows"):
        match_rows(outputs([[1.0, 0.0], [0.0, 1.0]], FEATURES).head, means)
