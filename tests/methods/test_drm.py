import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.drm import Drm
from mergewell.methods.ties import Ties


@pytest.mark.parametrize("along", ["outputs", "inputs"])
def test_worked_example(along: str) -> None:
    # M_1 M_1' + M_2 M_2' = diag(20, 10): the basis is that of the axes. Along the first 4 and 2
    # have the mean 3; along the second -3 is elected against 1, and stands alone
    first, second = [[4.0, 0.0], [0.0, -3.0]], [[2.0, 0.0], [0.0, 1.0]]
    merged = Drm(along=along, density=1.0).merge(group(first, second)) - 10
    torch.testing.assert_close(merged, torch.diag(torch.tensor([3.0, -3.0])).double())
    half = Drm(along=along, density=0.25).merge(group(first, second)) - 10  # one entry of four
    torch.testing.assert_close(half, torch.diag(torch.tensor([3.0, 0.0])).double())


def test_the_basis_is_common_to_all_experts() -> None:
    # all changes lie along one output direction u: one coordinate row, TIES on it, times u
    u = torch.tensor([0.6, 0.8], dtype=torch.float64)
    rows = [torch.tensor(r, dtype=torch.float64) for r in ([3.0, -1.0, 2.0], [1.0, 4.0, 0.5])]
    merged = Drm(density=1.0).merge(group(*(torch.outer(u, r) for r in rows))) - 10
    ties = Ties(density=1.0).merge(group(*rows)) - 10
    torch.testing.assert_close(merged, torch.outer(u, ties))


def test_short_directions_are_dropped() -> None:
    tau = torch.diag(torch.tensor([100.0, 5.0, 0.5]))
    assert (Drm(density=1.0).merge(group(tau)) - 10).diagonal().tolist() == pytest.approx(
        [100.0, 5.0, 0.0]
    )
    assert (Drm(density=1.0, cutoff=0.1).merge(group(tau)) - 10)[1, 1].item() == pytest.approx(0)


def test_turned_matrices_turn_the_result() -> None:
    taus = [drawn(4, 6, seed=s) for s in range(3)]
    merged = Drm(along="outputs", density=0.5).merge(group(*taus))
    turned = Drm(along="inputs", density=0.5).merge(group(*(t.T for t in taus)))
    torch.testing.assert_close(merged, turned.T)
