"""Magnitude and noise curves: what is invariant stays, what is not is counted."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from mergewell.explain.stability import (
    Stability,
    calibration_error,
    measure_stability,
    scaled,
    shaken,
)
from mergewell.labelled import LabelledInputs


def relu_net(seed: int, *, bias: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 16, bias=bias), nn.ReLU(), nn.Linear(16, 8, bias=bias),
        nn.ReLU(), nn.Linear(8, 3, bias=bias),
    )  # fmt: skip


def test_a_bias_free_relu_net_is_invariant_and_its_logits_grow_by_the_depth(
    data: LabelledInputs,
) -> None:
    models = [relu_net(1), relu_net(2)]
    found = measure_stability(models, data, noises=())
    for subject in ("single", "soup", "logit_ensemble", "feature_ensemble_mean_head"):
        points = found.curve("magnitude", subject)
        assert [point.amount for point in points] == [0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0]
        for point in points:
            assert point.agreement == 1.0
            assert point.logit_scale == pytest.approx(point.amount**3, rel=1e-4)


def test_biases_break_the_invariance(data: LabelledInputs) -> None:
    """Shrunk, only the last bias is left: every answer is its class."""
    module = relu_net(1, bias=True)
    with torch.no_grad():
        module[5].bias.copy_(torch.tensor([0.0, 0.3, 0.0]))
    assert data.labels is not None
    found = measure_stability([module], data, noises=())
    tiny = found.curve("magnitude", "single")[0]
    assert tiny.agreement < 0.9
    assert tiny.accuracy == pytest.approx(float((data.labels == 1).double().mean()))


def test_one_scaled_expert_dominates_every_combination(data: LabelledInputs) -> None:
    models = [relu_net(1), relu_net(2), relu_net(3)]
    found = measure_stability(models, data, factors=(1.0, 1000.0), noises=())
    alone = {
        place: measure_stability([models[place]], data, factors=(1.0,), noises=()).points[0]
        for place in (0, 2)
    }
    for which, place in (("first", 0), ("last", 2)):
        for subject in ("soup", "logit_ensemble"):
            point = found.curve("magnitude", subject, which)[1]  # pyright: ignore
            assert point.accuracy == pytest.approx(alone[place].accuracy, abs=0.02)
    assert found.curve("magnitude", "soup", "all_but_last")[1].agreement < 1.0


def test_re_estimated_batch_norms_are_invariant_and_stored_ones_are_not(
    data: LabelledInputs,
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 3, bias=False),
    ).eval()  # fmt: skip
    found = measure_stability([module], data, factors=(0.1, 1.0, 10.0), noises=(0.1,))
    assert {point.batch_norm for point in found.points} == {"stored", "reestimated"}
    mended = found.curve("magnitude", "single", batch_norm="reestimated")
    assert all(point.agreement > 0.99 for point in mended)
    module[1].running_mean.fill_(3.0)
    stored = measure_stability([module], data, factors=(0.1,), noises=())
    assert stored.curve("magnitude", "single", batch_norm="stored")[0].agreement < 0.99


def test_the_curves_cover_every_architecture(
    experts: dict[str, nn.Module], data: LabelledInputs
) -> None:
    def measured(seed: int = 0) -> Stability:
        models = list(experts.values())
        return measure_stability(models, data, factors=(1.0, 10.0), noises=(0.01, 0.5), seed=seed)

    found = measured()
    unchanged = [p for p in found.points if p.curve == "magnitude" and p.amount == 1.0]
    assert unchanged
    assert all(p.agreement == 1.0 and p.logit_scale == pytest.approx(1.0) for p in unchanged)
    quiet, loud = found.curve("noise", "soup", batch_norm=unchanged[0].batch_norm)
    assert quiet.agreement > loud.agreement
    assert found == measured()
    assert found != measured(seed=1)
    json.dumps(found.as_data(), allow_nan=False)


def test_scaling_leaves_running_statistics_and_the_module_alone() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(5.0)
    changed = scaled(norm, 3.0)
    assert changed.weight.tolist() == [3.0, 3.0]
    assert changed.running_mean.tolist() == [5.0, 5.0]
    assert norm.weight.tolist() == [1.0, 1.0]


def test_noise_has_the_asked_deviation() -> None:
    torch.manual_seed(0)
    module = nn.Linear(200, 200)
    difference = (shaken(module, 0.2, seed=3).weight - module.weight).detach()
    assert float(difference.std() / module.weight.detach().std()) == pytest.approx(0.2, rel=0.02)
    assert torch.equal(shaken(module, 0.2, seed=3).weight, shaken(module, 0.2, seed=3).weight)
    assert not torch.equal(shaken(module, 0.2, seed=3).weight, shaken(module, 0.2, seed=4).weight)
    constant = nn.LayerNorm(4)
    assert torch.equal(shaken(constant, 0.5, seed=0).weight, constant.weight)


def test_calibration_error_by_hand() -> None:
    """Two answers at confidence 0.8, one right: |0.5 - 0.8|; two at 0.5, both right: 0.5."""
    sure, unsure = [math.log(4.0), 0.0], [0.0, 0.0]
    logits = torch.tensor([sure, sure, unsure, unsure])
    labels = torch.tensor([0, 1, 0, 0])
    assert calibration_error(logits, labels) == pytest.approx((2 * 0.3 + 2 * 0.5) / 4, abs=1e-6)


def test_logits_that_overflow_count_as_wrong(data: LabelledInputs) -> None:
    found = measure_stability([relu_net(1)], data, factors=(1e14,), noises=())
    point = found.points[0]
    assert point.finite < 1.0
    assert point.agreement <= point.finite
    json.dumps(found.as_data(), allow_nan=False)
