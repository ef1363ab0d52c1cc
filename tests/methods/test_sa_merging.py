import torch
from task_matrices import drawn, group

from mergewell.methods.sa_merging import SaMerging
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.tensor_group import TensorGroup


def test_worked_example() -> None:
    # base [[10, 10], [-10, -10]], taus [[1, -4], [3, 2]] and [[1, 5], [-1, 1]], sum
    # [[2, 1], [2, 3]]; saliency sign(theta) * sum = [[2, 1], [-2, -3]] for both: half keeps row 0
    base = torch.tensor([[10.0, 10.0], [-10.0, -10.0]], dtype=torch.float64)
    taus = [
        torch.tensor(t, dtype=torch.float64)
        for t in ([[1.0, -4.0], [3.0, 2.0]], [[1.0, 5.0], [-1.0, 1.0]])
    ]
    ones = torch.ones(2, dtype=torch.float64)
    tensors = TensorGroup("w", tuple(base + tau for tau in taus), ones, base)
    merged = SaMerging(drop=0.5, rounds=1).merge(tensors) - base
    assert merged.tolist() == [[2.0, 1.0], [0.0, 0.0]]
    merged = SaMerging(drop=0.5, rounds=2).merge(tensors) - base
    assert merged.tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_rounds_leave_a_falling_share() -> None:
    tau = drawn(30, 40)
    for rounds, share in ((0, 1.0), (1, 0.8), (3, 0.512)):
        merged = SaMerging(rounds=rounds).merge(group(tau)) - 10
        kept = float((merged.abs() > 1e-9).double().mean())
        assert abs(kept - share) < 2e-3
        assert float(merged.clamp(min=0).sum()) > 0


def test_dropping_nothing_is_the_plain_sum() -> None:
    tensors = group(*(drawn(5, 6, seed=s) for s in range(3)), coefficients=[1.0, 2.0, -1.0])
    plain = TaskArithmetic(scale=1.0).merge(tensors)
    torch.testing.assert_close(SaMerging(drop=0.0).merge(tensors), plain)
