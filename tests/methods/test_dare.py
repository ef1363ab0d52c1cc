import pytest
import torch

from mergewell.methods.dare import Dare
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties
from mergewell.tensor_group import TensorGroup


def group(size: int = 40_000, experts: int = 2) -> TensorGroup:
    torch.manual_seed(0)
    base = torch.randn(size)
    moved = tuple(base + torch.randn(size) for _ in range(experts))
    return TensorGroup("w", moved, torch.ones(experts), base)


def test_worked_example_keeps_where_the_random_number_is_below_the_density() -> None:
    base = torch.zeros(6)
    tensors = TensorGroup("w", (base + 1,), torch.ones(1), base)
    kept = tensors.uniform(0) < 0.5
    assert 0 < kept.sum() < 6
    assert Dare(density=0.5).merge(tensors).tolist() == [2.0 * k for k in kept.tolist()]


def test_kept_fraction_and_mean_are_as_promised() -> None:
    tensors = group(experts=1)
    thin = Dare(density=0.3, combine="sum").merge(tensors) - tensors.required_base
    kept = float((thin != 0).double().mean())
    assert abs(kept - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5
    torch.testing.assert_close(
        thin.sum() / 40_000, tensors.task_vectors[0].mean(), atol=0.03, rtol=0
    )


def test_rescaling_by_norm_restores_the_l1_norm() -> None:
    tensors = group(experts=1)
    thin = Dare(density=0.3, combine="sum", rescale="norm").merge(tensors) - tensors.required_base
    whole = float(tensors.task_vectors[0].abs().sum())
    assert float(thin.abs().sum()) == pytest.approx(whole, rel=1e-4)


def test_experts_get_different_masks_and_seeds_other_ones() -> None:
    tensors = group()
    assert not torch.equal(tensors.uniform(0) < 0.5, tensors.uniform(1) < 0.5)
    other = TensorGroup("w", tensors.experts, tensors.coefficients, tensors.base, seed=1)
    assert not torch.equal(tensors.uniform(0), other.uniform(0))


def test_density_one_reduces_to_task_arithmetic_and_to_ties() -> None:
    tensors = group(100, 3)
    plain = TaskArithmetic(scale=1.0).merge(tensors)
    assert torch.equal(Dare(density=1.0, combine="sum").merge(tensors), plain)
    elected = Ties(density=1.0).merge(tensors)
    assert torch.equal(Dare(density=1.0, combine="agreeing").merge(tensors), elected)
