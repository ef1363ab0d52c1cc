import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.svc import Svc
from mergewell.methods.task_arithmetic import TaskArithmetic

SUM = TaskArithmetic(scale=1.0)


def test_worked_example() -> None:
    # the sum is diag(6, 2). Along e1 the experts have 4 and 2, so 6 / 4 and 6 / 2 of what they
    # have: factor 2 / (1.5 + 3) = 4 / 9. Along e2 they have 2 and 0: 1 and the floor 1 / 2
    tensors = group([[4.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 0.0]])
    merged = Svc(of=SUM).merge(tensors) - 10
    assert merged[0, 0].item() == pytest.approx(6 * 4 / 9)
    assert merged[1, 1].item() == pytest.approx(2 * 2 / 1.5)
    floored = Svc(of=SUM, floor=2.0).merge(tensors) - 10
    assert floored[0, 0].item() == pytest.approx(6 * 2 / (2 + 3))
    assert floored[1, 1].item() == pytest.approx(2 * 2 / 4)


def test_a_vector_is_one_direction() -> None:
    # tau 3 and 1 add up to 4: counted 4 / 3 and 4 times, 4 * 2 / (16 / 3) = 1.5
    merged = Svc(of=SUM).merge(group([3.0, 0.0], [1.0, 0.0])) - 10
    assert merged.tolist() == pytest.approx([1.5, 0.0])
    opposed = Svc(of=SUM).merge(group([3.0], [-1.0])) - 10  # 2 / 3 of the first, floor 1 / 2
    assert opposed.tolist() == pytest.approx([2 * 2 / (2 / 3 + 0.5)])


def test_one_expert_and_equal_experts_come_back() -> None:
    tau = drawn(5, 7)
    for taus in ([tau], [tau, tau, tau]):
        torch.testing.assert_close(Svc(of=SUM).merge(group(*taus)) - 10, tau)


def test_the_inner_scale_does_not_matter_where_the_floor_is_not_reached() -> None:
    tensors = group(*(drawn(4, 6, seed=1) + 0.1 * drawn(4, 6, seed=s) for s in (2, 3)))
    low, high = (
        Svc(of=TaskArithmetic(scale=scale), floor=1e-3).merge(tensors) for scale in (0.3, 1.0)
    )
    torch.testing.assert_close(low, high)
