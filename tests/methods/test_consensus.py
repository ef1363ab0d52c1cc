import torch

from mergewell.methods.consensus import Consensus
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[float]) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    return TensorGroup("w", tuple(base + tau for tau in taus), torch.ones(len(taus)), base)


def test_worked_example() -> None:
    # others' sums: first expert 3, 1, 0, 5; second 4, 9, 0, 1
    tensors = group([4.0, 9.0, 0.0, 1.0], [3.0, 1.0, 0.0, 5.0])
    # matters to: both, the first alone (1 < 0.5 * 9), both (0 >= 0), the second alone
    assert Consensus(threshold=0.5, scale=1.0).merge(tensors).tolist() == [17, 10, 10, 10]
    each = Consensus(threshold=(0.1, 0.1), scale=1.0).merge(tensors)
    assert each.tolist() == [17, 20, 10, 16]
    selfish = Consensus(threshold=0.5, minimum=1, scale=0.5).merge(tensors)
    assert selfish.tolist() == [13.5, 15, 10, 13]


def test_threshold_zero_reduces_to_task_arithmetic() -> None:
    tensors = group([1.0, -2.0], [3.0, 0.5], [0.0, 1.0])
    plain = TaskArithmetic(scale=0.3).merge(tensors)
    assert torch.equal(Consensus(threshold=0.0).merge(tensors), plain)


def test_refuses_fewer_experts_than_must_agree() -> None:
    assert "minimum = 2" in Consensus().objection([1.0])
    assert not Consensus().objection([1.0, 1.0])
