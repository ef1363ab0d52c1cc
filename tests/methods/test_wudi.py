import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.wudi import Wudi


def loss(merged, taus) -> float:
    return sum(float(((merged - t) @ t.T).square().sum() / t.square().sum()) for t in taus)


def test_worked_example() -> None:
    # one output: M_1 = (2, 0), M_2 = (1, 1). C = diag(1, 0) + [[1, 1], [1, 1]] / 2, mean
    # eigenvalue 1; B = (2, 0) + (1, 1) = (3, 1); A = (3, 1), A C = (5, 2). With anchor 1/2:
    # (B - A C) (C + 1/2)^-1 = (-2, -1) [[2, .5], [.5, 1]]^-1 = (-6/7, -4/7)
    first, second = [[2.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]
    merged = Wudi(anchor=0.5).merge(group(first, second)) - 10
    assert merged[0].tolist() == pytest.approx([3 - 6 / 7, 1 - 4 / 7])
    assert merged[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("solver", ["anchored", "iterative"])
def test_one_expert_comes_back(solver: str) -> None:
    tau = 0.01 * drawn(6, 9)
    merged = Wudi(solver=solver).merge(group(tau))
    torch.testing.assert_close(merged, tau + 10, atol=1e-8, rtol=0)


def test_both_solvers_lower_the_interference() -> None:
    taus = [0.001 * drawn(12, 10, seed=s) for s in range(3)]
    start = loss(torch.stack(taus).sum(0), taus)
    plain = Wudi(solver="iterative", steps=0).merge(group(*taus))
    torch.testing.assert_close(plain, TaskArithmetic(scale=1.0).merge(group(*taus)))
    iterated = loss(Wudi(solver="iterative").merge(group(*taus)) - 10, taus)
    anchored = [loss(Wudi(anchor=a).merge(group(*taus)) - 10, taus) for a in (10.0, 0.1, 1e-6)]
    assert iterated < 0.5 * start
    assert start > anchored[0] > anchored[1] > anchored[2]


def test_iterations_are_those_of_torch_adam() -> None:
    taus = [0.01 * drawn(4, 5, seed=s) for s in range(2)]
    point = torch.nn.Parameter(taus[0] + taus[1])
    adam = torch.optim.Adam([point], lr=1e-3)
    for _ in range(5):
        adam.zero_grad()
        total = sum(((point - t) @ t.T).square().sum() / t.square().sum() for t in taus)
        total.backward()
        adam.step()
    merged = Wudi(solver="iterative", steps=5, step_size=1e-3).merge(group(*taus)) - 10
    torch.testing.assert_close(merged, point.detach(), atol=1e-9, rtol=1e-6)
