import math

import pytest
import torch
from pydantic import ValidationError

from mergewell.methods.karcher import Karcher
from mergewell.methods.multislerp import Multislerp
from mergewell.tensor_group import TensorGroup


def group(*experts: list[float]) -> TensorGroup:
    tensors = tuple(torch.tensor(e, dtype=torch.float64) for e in experts)
    return TensorGroup("w", tensors, torch.ones(len(tensors), dtype=torch.float64))


def on_circle(degrees: float, radius: float = 1.0) -> list[float]:
    return [radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))]


def test_worked_example_averages_angles_and_lengths() -> None:
    tensors = group(on_circle(0, 1), on_circle(10, 2), on_circle(80, 3))
    assert Karcher().merge(tensors).tolist() == pytest.approx(on_circle(30, 2), rel=1e-4)


def test_one_step_along_a_circle_arrives() -> None:
    tensors = group(on_circle(0), on_circle(10), on_circle(80))
    assert Karcher(iterations=1).merge(tensors).tolist() == pytest.approx(on_circle(30), rel=1e-12)


def test_settled_it_is_the_mean_of_multislerp_and_without_steps_its_projection() -> None:
    torch.manual_seed(0)
    tensors = group(*torch.randn(4, 30, dtype=torch.float64).tolist())
    settled = Karcher(iterations=200, tolerance=1e-12).merge(tensors)
    torch.testing.assert_close(settled, Multislerp().merge(tensors))
    unmoved = Karcher(iterations=0).merge(tensors)
    projected = Multislerp(tangent="projection").merge(tensors)
    torch.testing.assert_close(unmoved, projected)
    assert not torch.allclose(unmoved, settled)


def test_a_zero_tensor_only_shortens() -> None:
    assert Karcher().merge(group([2.0, 0.0], [0.0, 0.0])).tolist() == [1.0, 0.0]


def test_refuses_a_tolerance_of_zero_and_coefficients_that_sum_to_zero() -> None:
    with pytest.raises(ValidationError):
        Karcher(tolerance=0.0)
    assert "sum to 0" in Karcher().objection([2.0, -2.0])
