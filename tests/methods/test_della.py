import pytest
import torch
from pydantic import ValidationError

from mergewell.methods.dare import Dare
from mergewell.methods.della import Della
from mergewell.methods.ties import Ties
from mergewell.statistics.kept_norm import keep_probability
from mergewell.tensor_group import TensorGroup


def group(*shape: int, experts: int = 1) -> TensorGroup:
    torch.manual_seed(0)
    base = torch.randn(shape)
    moved = tuple(base + torch.randn(shape) for _ in range(experts))
    return TensorGroup("w", moved, torch.ones(experts), base)


def test_worked_example_of_the_probabilities() -> None:
    tau = torch.tensor([[0.3, -0.1, 0.2], [5.0, 5.0, -7.0]])
    by_rank = keep_probability(tau, 0.5, 0.1, "rank")
    torch.testing.assert_close(by_rank, torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.5, 0.6]]))
    by_size = keep_probability(tau, 0.5, 0.1, "magnitude")
    torch.testing.assert_close(by_size, torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.4, 0.6]]))
    assert keep_probability(torch.tensor([[2.0]]), 0.5, 0.1, "rank").tolist() == [[0.5]]
    assert keep_probability(torch.tensor([2.0, 2.0]), 0.5, 0.1, "magnitude").tolist() == [0.5, 0.5]


def test_worked_example_divides_survivors_by_their_probability() -> None:
    base = torch.zeros(1, 5)
    tau = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.5]])
    tensors = TensorGroup("w", (tau,), torch.ones(1), base, seed=1)
    probability = torch.tensor([[0.7, 0.6, 0.5, 0.4, 0.3]])
    kept = tensors.uniform(0) < probability
    assert 0 < kept.sum() < 5
    merged = Della(density=0.5, epsilon=0.2).merge(tensors)
    torch.testing.assert_close(merged, torch.where(kept, tau / probability, 0.0))


def test_large_entries_are_kept_more_often_as_promised() -> None:
    tensors = group(200, 400)
    method = Della(density=0.4, epsilon=0.3, rescale="none", combine="sum")
    kept = (method.merge(tensors) - tensors.required_base != 0).double()
    order = tensors.task_vectors[0].abs().argsort(1)
    by_rank = kept.gather(1, order).mean(0)  # from the smallest to the largest
    error = 5 * (0.25 / (200 * 100)) ** 0.5
    assert float(by_rank.mean()) == pytest.approx(0.4, abs=error)
    assert float(by_rank[:100].mean()) == pytest.approx(0.1 + 0.6 / 8, abs=error)
    assert float(by_rank[-100:].mean()) == pytest.approx(0.7 - 0.6 / 8, abs=error)


def test_rescaling_by_norm_restores_the_l1_norm() -> None:
    tensors = group(40, 50)
    method = Della(density=0.3, epsilon=0.1, combine="sum", rescale="norm")
    thin = method.merge(tensors) - tensors.required_base
    whole = float(tensors.task_vectors[0].abs().sum())
    assert float(thin.abs().sum()) == pytest.approx(whole, rel=1e-4)


def test_no_spread_reduces_to_dare_and_density_one_to_ties() -> None:
    tensors = group(30, 20, experts=3)
    dare = Dare(density=0.5).merge(tensors)
    torch.testing.assert_close(Della(density=0.5, epsilon=0.0).merge(tensors), dare)
    assert torch.equal(Della(density=1.0).merge(tensors), Ties(density=1.0).merge(tensors))


def test_probabilities_outside_0_and_1_are_refused() -> None:
    with pytest.raises(ValidationError, match="lower epsilon"):
        Della(density=0.9, epsilon=0.2)
