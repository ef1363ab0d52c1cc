import math

import pytest
import torch

from mergewell.methods.average import Average
from mergewell.methods.base import Needs
from mergewell.methods.multislerp import Multislerp
from mergewell.methods.slerp import Slerp
from mergewell.tensor_group import TensorGroup


def group(*experts: list[float], coefficients: list[float] | None = None) -> TensorGroup:
    tensors = tuple(torch.tensor(e, dtype=torch.float64) for e in experts)
    shares = torch.tensor(coefficients or [1.0] * len(tensors), dtype=torch.float64)
    return TensorGroup("w", tensors, shares, torch.zeros_like(tensors[0]))


def on_circle(degrees: float, radius: float = 1.0) -> list[float]:
    return [radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))]


def test_worked_example_on_a_circle_averages_angles_and_lengths() -> None:
    # angles 0, 10, 80 have the mean 30; lengths 1, 2, 3 the mean 2
    tensors = group(on_circle(0, 1), on_circle(10, 2), on_circle(80, 3))
    assert Multislerp().merge(tensors).tolist() == pytest.approx(on_circle(30, 2))
    weighted = group(on_circle(0), on_circle(80), coefficients=[3.0, 1.0])
    assert Multislerp().merge(weighted).tolist() == pytest.approx(on_circle(20))


def test_projection_is_the_normalised_mean_direction_as_in_mergekit() -> None:
    tensors = group(on_circle(0, 1), on_circle(10, 2), on_circle(80, 3))
    mean = torch.stack([e / e.norm() for e in tensors.experts]).mean(0)
    expected = 2 * mean / mean.norm()
    merged = Multislerp(tangent="projection").merge(tensors)
    torch.testing.assert_close(merged, expected)
    assert merged.tolist() != pytest.approx(on_circle(30, 2), abs=1e-3)


def test_the_mean_is_where_the_logarithms_balance() -> None:
    torch.manual_seed(0)
    tensors = group(*torch.randn(4, 30, dtype=torch.float64).tolist())
    merged = Multislerp().merge(tensors)
    mean = merged / merged.norm()
    pull = torch.zeros_like(mean)
    for expert in tensors.experts:
        unit = expert / expert.norm()
        angle = (unit @ mean).arccos()
        pull += angle / angle.sin() * (unit - (unit @ mean) * mean)
    assert float(pull.norm()) < 1e-8


def test_reduces_to_slerp_for_two_of_one_length() -> None:
    tensors = group(on_circle(0), on_circle(90))
    torch.testing.assert_close(Multislerp().merge(tensors), Slerp().merge(tensors))


def test_task_vectors_start_from_the_base_and_zeros_have_no_direction() -> None:
    base = torch.tensor([5.0, 5.0], dtype=torch.float64)
    experts = (base + torch.tensor([2.0, 0.0]), base)
    tensors = TensorGroup("w", experts, torch.ones(2, dtype=torch.float64), base)
    # the only direction there is, at the mean length of 2 and 0
    assert Multislerp(of="task_vectors").merge(tensors).tolist() == [6.0, 5.0]
    assert Multislerp(of="task_vectors").needs == Needs(base=True)


def test_directions_that_cancel_take_the_straight_line() -> None:
    tensors = group([1.0, 0.0], [-3.0, 0.0])
    torch.testing.assert_close(Multislerp().merge(tensors), Average().merge(tensors))


def test_coefficients_as_they_are_scale_the_length() -> None:
    tensors = group(on_circle(0), on_circle(90))
    doubled = Multislerp(normalize=False).merge(tensors)
    torch.testing.assert_close(doubled, 2 * Multislerp().merge(tensors))


def test_refuses_coefficients_that_sum_to_zero() -> None:
    assert "sum to 0" in Multislerp().objection([1.0, -1.0])
