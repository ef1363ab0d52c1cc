import pytest
import torch

from mergewell.methods.ram import Ram
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.wise_ft import WiseFt
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[float]) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.zeros_like(taus[0])
    return TensorGroup("w", tuple(base + tau for tau in taus), torch.ones(len(taus)), base)


def test_worked_example() -> None:
    tensors = group([4.0, 1.0, 0.0, 1e-6, 3.0], [2.0, 0.0, -5.0, 1e-6, 0.0])
    # shared: the first, its mean 3; own: 1, -5 and 3; both below epsilon: nothing
    assert Ram().merge(tensors).tolist() == [3.0, 1.0, -5.0, 0.0, 3.0]
    # own / shared: 2 and 1 of the first expert, 1 and 1 of the second
    plus = Ram(plus=True, r=0.5, alpha=0.75).merge(tensors)
    assert plus.tolist() == pytest.approx([3.0, 1.25, -5 * 1.375, 0.0, 3.75])


def test_counts_of_the_whole_model_are_added_up() -> None:
    tensors = [group([1.0, 1.0], [1.0, 0.0]), group([1.0, 0.0], [0.0, 0.0])]
    groups = [TensorGroup(n, g.experts, g.coefficients, g.base)
              for n, g in zip("ab", tensors, strict=True)]  # fmt: skip
    (statistic,) = Ram(plus=True, scope="model").statistics()
    value = statistic.measure(groups)["b"]
    assert value["own"].tolist() == [2, 0] and value["shared"].tolist() == [1, 1]


def test_disjoint_changes_reduce_to_a_sum_and_common_ones_to_an_average() -> None:
    disjoint = group([1.0, 0.0, 2.0], [0.0, 3.0, 0.0])
    assert torch.equal(Ram().merge(disjoint), TaskArithmetic(scale=1.0).merge(disjoint))
    common = group([1.0, 4.0], [3.0, 1.0])
    assert torch.equal(Ram().merge(common), WiseFt(t=1.0).merge(common))
