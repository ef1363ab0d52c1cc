import pytest
import torch

from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[float], coefficients: list[float] | None = None) -> TensorGroup:
    base = torch.full((len(task_vectors[0]),), 10.0)
    experts = tuple(base + torch.tensor(tau) for tau in task_vectors)
    return TensorGroup("w", experts, torch.tensor(coefficients or [1.0] * len(experts)), base)


def test_worked_example() -> None:
    # density 0.5 keeps [4, -3, 0, 0], [0, 1.5, 0, 2], [3, 0, 0, -1]
    tensors = group([4, -3, 1, 0.5], [1, 1.5, 0.5, 2], [3, 0.5, -0.25, -1])
    # signs by mass: +7, -1.5, 0, +1 -> +, -, (+), +; means of those that agree: 3.5, -3, 0, 2
    assert Ties(density=0.5).merge(tensors).tolist() == [13.5, 7.0, 10.0, 12.0]


def test_election_by_count_differs_from_mass() -> None:
    tensors = group([5.0], [-1.0], [-2.0])
    assert Ties(density=1.0, elect="mass").merge(tensors).tolist() == [15.0]
    assert Ties(density=1.0, elect="count").merge(tensors).tolist() == [8.5]


def test_divisors() -> None:
    tensors = group([4.0], [2.0], coefficients=[1.0, 0.5])
    assert Ties(density=1.0, divide="count").merge(tensors).tolist() == [12.5]  # (4 + 1) / 2
    coefficients = Ties(density=1.0, divide="coefficients").merge(tensors)
    torch.testing.assert_close(coefficients, torch.tensor([10 + 5 / 1.5]))
    assert Ties(density=1.0, divide="none", scale=0.3).merge(tensors).tolist() == [11.5]


def test_votes_with_coefficients() -> None:
    tensors = group([2.0], [-1.0], coefficients=[0.1, 1.0])
    assert Ties(density=1.0, votes="plain").merge(tensors).tolist() == [pytest.approx(10.2)]
    assert Ties(density=1.0, votes="weighted").merge(tensors).tolist() == [9.0]


def test_exactly_k_are_kept_ties_from_the_front() -> None:
    tensors = group([1.0, 1.0, 1.0, 1.0, -1.0])
    assert Ties(density=0.6).merge(tensors).tolist() == [11.0, 11.0, 11.0, 10.0, 10.0]


def test_density_one_with_agreeing_signs_reduces_to_task_arithmetic_over_k() -> None:
    torch.manual_seed(0)
    base = torch.randn(100, dtype=torch.float64)
    moved = tuple(base + torch.rand(100, dtype=torch.float64) for _ in range(3))
    tensors = TensorGroup("w", moved, torch.ones(3, dtype=torch.float64), base)
    expected = TaskArithmetic(scale=1 / 3).merge(tensors)
    torch.testing.assert_close(Ties(density=1.0).merge(tensors), expected)


def test_each_expert_may_have_its_own_density() -> None:
    tensors = group([4, -3, 1, 0.5], [4, 3, 2, 1])
    # keeps [4, 0, 0, 0] and [4, 3, 2, 0]
    assert Ties(density=(0.25, 0.75)).merge(tensors).tolist() == [14.0, 13.0, 12.0, 10.0]


def test_mergekit_votes_count_a_negative_coefficient_as_the_opposite_sign() -> None:
    tensors = group([2.0], [1.0], coefficients=[-1.0, 1.0])
    # weighted votes -2 and 1 elect minus; only the first agrees: -2 / -1 with its coefficient
    weighted = Ties(density=1.0, votes="weighted", divide="coefficients")
    assert weighted.merge(tensors).tolist() == [12.0]


def test_rescaling_restores_the_l1_norm_and_adding_up_does_not_elect() -> None:
    tensors = group([4, -3, 1, 2], [4, -3, 1, -2])
    rescaled = Ties(density=0.5, rescale="norm").merge(tensors)
    torch.testing.assert_close(rescaled, torch.tensor([10 + 4 / 0.7, 10 - 3 / 0.7, 10, 10]))
    assert Ties(density=1.0, combine="sum").merge(tensors).tolist() == [18, 4, 12, 10]
    halved = Ties(density=1.0, combine="sum", divide="coefficients").merge(tensors)
    assert halved.tolist() == [14, 7, 11, 10]
