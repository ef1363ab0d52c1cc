"""Eight ways to combine experts, and the identity behind their differences."""

from __future__ import annotations

import copy
import json
from typing import get_args

import pytest
import torch
from torch import nn

from mergewell.errors import RecipeError
from mergewell.explain.averaging import Way, compare_averaging, decompose
from mergewell.explain.split import run_split, soup
from mergewell.labelled import LabelledInputs, accuracy
from mergewell.models.batch_norm import batch_norms


def linear(rows: list[list[float]]) -> nn.Module:
    module = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(rows))
    return module


def test_the_identity_holds_to_float_precision(
    experts: dict[str, nn.Module], data: LabelledInputs, choosing: LabelledInputs
) -> None:
    found = compare_averaging(experts, data, choosing=choosing)
    assert len(found.decompositions) == (2 if batch_norms(experts["expert 1"]) else 1)
    for part in found.decompositions:
        assert part.nonlinearity > 1e-3
        assert part.residual < 1e-6
        squares = part.covariance**2 + part.nonlinearity**2
        squares += 2 * part.cosine * part.covariance * part.nonlinearity
        assert part.difference == pytest.approx(squares**0.5, rel=1e-4)


def test_two_layers_by_hand() -> None:
    """f_j(x) = W_j relu(V_j x): one input of 1, hidden weights 1 and -3, heads 2 and 4."""

    def model(hidden: float, head: float) -> nn.Module:
        made = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
        with torch.no_grad():
            made[0].weight.fill_(hidden)
            made[2].weight.copy_(torch.tensor([[head], [0.0]]))
        return made

    models = [model(1.0, 2.0), model(-3.0, 4.0)]
    batch = [torch.ones(1, 1)]
    own = [run_split(each, "2", batch) for each in models]
    found = decompose(own, run_split(soup(models), "2", batch))
    # features 1 and 0, their mean 0.5; the soup's hidden weight -1 gives 0
    # ensemble (2 + 0) / 2 = 1; soup 3 * 0 = 0; gap 3 * 0.5 = 1.5; covariance (2 - 3) * 0.5 = -0.5
    assert (found.difference, found.nonlinearity, found.covariance) == (1.0, 1.5, 0.5)
    assert (found.cosine, found.residual) == (-1.0, 0.0)


def test_one_linear_map_averages_features_and_weights_alike(data: LabelledInputs) -> None:
    torch.manual_seed(0)
    models = {str(i): nn.Sequential(nn.Flatten(), nn.Linear(36, 3)) for i in range(3)}
    part = compare_averaging(models, data).decompositions[0]
    assert (part.nonlinearity, part.covariance) == (0.0, 0.0)
    assert part.difference < 1e-6


def test_all_eight_ways_are_tried_with_labels_to_choose_on(
    experts: dict[str, nn.Module], data: LabelledInputs, choosing: LabelledInputs
) -> None:
    found = compare_averaging(experts, data, choosing=choosing)
    assert {variant.way for variant in found.variants} == set(get_args(Way))
    assert found.left_out == {}
    for name, expert in experts.items():
        row = next(v for v in found.variants if v.way == "single" and v.members == (name,))
        assert row.accuracy is not None
        assert row.accuracy.value == pytest.approx(accuracy(expert, data))
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high
    merged = found.of("uniform_soup")
    assert merged.accuracy is not None
    assert merged.accuracy.value == pytest.approx(accuracy(soup(list(experts.values())), data))
    assert found.of("logit_ensemble").agreement.value == 1.0
    json.dumps(found.as_data(), allow_nan=False)


def test_dropout_is_off_and_nothing_is_changed(
    experts: dict[str, nn.Module], data: LabelledInputs, choosing: LabelledInputs
) -> None:
    before = copy.deepcopy(experts)
    training = {name: module.train() for name, module in experts.items()}
    first = compare_averaging(training, data, choosing=choosing)
    assert first == compare_averaging(training, data, choosing=choosing)
    for name, module in experts.items():
        assert module.training
        module.eval()
        for left, right in zip(
            module.state_dict().values(), before[name].state_dict().values(), strict=True
        ):
            assert torch.equal(left, right)


def test_greedy_soups_leave_out_a_broken_expert(
    experts: dict[str, nn.Module], data: LabelledInputs, choosing: LabelledInputs
) -> None:
    broken = copy.deepcopy(experts["expert 1"])
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.mul_(-20.0)
    found = compare_averaging({"broken": broken, **experts}, data, choosing=choosing)
    assert "broken" not in found.of("greedy_soup").members
    assert "broken" not in found.of("selected_logit_ensemble").members
    assert "broken" in found.of("uniform_soup").members
    assert found.of("greedy_soup_in_order").members[0] == "broken"  # the order is the given one


def test_without_labels_only_agreement_is_measured(
    experts: dict[str, nn.Module], data: LabelledInputs
) -> None:
    found = compare_averaging(experts, LabelledInputs(data.batches))
    assert all(variant.accuracy is None for variant in found.variants)
    assert set(found.left_out.values()) == {"needs labelled samples to choose on"}
    assert len(found.left_out) == 4
    with pytest.raises(KeyError):
        found.of("greedy_soup")


def test_no_experts_are_refused(data: LabelledInputs) -> None:
    with pytest.raises(RecipeError, match="no experts to compare"):
        compare_averaging({}, data)
