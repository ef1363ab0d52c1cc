import math

import pytest
import torch

from mergewell.methods.average import Average
from mergewell.methods.base import Needs
from mergewell.methods.nuslerp import Nuslerp
from mergewell.methods.slerp import Slerp
from mergewell.tensor_group import TensorGroup


def group(first: list, second: list, coefficients: tuple[float, float] = (1.0, 1.0)) -> TensorGroup:
    tensors = (torch.tensor(first), torch.tensor(second))
    return TensorGroup("w", tensors, torch.tensor(coefficients), torch.ones_like(tensors[0]))


def test_worked_example_takes_t_from_the_coefficients() -> None:
    third = Nuslerp().merge(group([2.0, 0.0], [0.0, 2.0], (2.0, 1.0)))
    assert third.tolist() == pytest.approx([2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)])


def test_rows_and_columns_have_angles_of_their_own() -> None:
    tensors = group([[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]])
    half = math.sqrt(0.5)
    rows = Nuslerp(along="row").merge(tensors)
    torch.testing.assert_close(rows, torch.tensor([[half, half], [2.0, 0.0]]))
    turned = TensorGroup("w", tuple(e.T.contiguous() for e in tensors.experts), torch.ones(2))
    columns = Nuslerp(along="column").merge(turned)
    torch.testing.assert_close(columns, rows.T)


def test_task_vectors_start_from_the_base() -> None:
    tensors = group([2.0, 1.0], [1.0, 2.0])  # task vectors [1, 0] and [0, 1] from the base of ones
    merged = Nuslerp(of="task_vectors").merge(tensors)
    torch.testing.assert_close(merged, torch.tensor([1 + math.sqrt(0.5)] * 2))


def test_reduces_to_slerp_and_for_parallel_or_zero_tensors_to_the_average() -> None:
    torch.manual_seed(0)
    tensors = group(torch.randn(4, 5).tolist(), torch.randn(4, 5).tolist(), (3.0, 1.0))
    torch.testing.assert_close(Nuslerp().merge(tensors), Slerp(t=0.25).merge(tensors))
    for second in ([3.0, 6.0], [0.0, 0.0]):
        line = group([1.0, 2.0], second, (1.0, 3.0))
        for along in ("tensor", "row"):
            torch.testing.assert_close(Nuslerp(along=along).merge(line), Average().merge(line))


def test_what_it_needs_follows_from_its_parameters() -> None:
    assert Nuslerp.needs == Needs(experts=2)
    assert Nuslerp(of="task_vectors").needs == Needs(base=True, experts=2)
    assert Nuslerp(along="row").needs.granularity == "row"
    assert Nuslerp(along="column").needs.granularity == "matrix"


def test_refuses_coefficients_that_sum_to_zero() -> None:
    assert "sum to 0" in Nuslerp().objection([1.0, -1.0])
    assert not Nuslerp().objection([1.0, 2.0])
