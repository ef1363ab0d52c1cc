import torch

from mergewell.methods.core_space import CoreSpace
from mergewell.methods.ties import Ties
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[list[float]]) -> TensorGroup:
    taus = [torch.tensor(tau, dtype=torch.float64) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    ones = torch.ones(len(taus), dtype=torch.float64)
    return TensorGroup("w", tuple(base + tau for tau in taus), ones, base)


def test_worked_example() -> None:
    # (1, 1)(1, 1)' and half of (1, -1)(1, -1)': in their own directions the cores are diag(2, 0)
    # and diag(0, 1), which do not meet, so that TIES adds them; entry by entry it would average
    experts = group([[1.0, 1.0], [1.0, 1.0]], [[0.5, -0.5], [-0.5, 0.5]])
    merged = CoreSpace(of=Ties(density=1.0)).merge(experts) - experts.required_base
    assert torch.allclose(merged, torch.tensor([[1.5, 0.5], [0.5, 1.5]]).double())
    entries = Ties(density=1.0).merge(experts) - experts.required_base
    assert entries.tolist() == [[0.75, 1.0], [1.0, 0.75]]


def test_both_sides_are_turned() -> None:
    # one output direction, inputs (1, 1) and (1, -1) / 2: the cores are (2^.5, 0) and (0, .5^.5)
    experts = group([[1.0, 1.0], [0.0, 0.0]], [[0.5, -0.5], [0.0, 0.0]])
    merged = CoreSpace(of=Ties(density=1.0)).merge(experts) - experts.required_base
    assert torch.allclose(merged, torch.tensor([[1.5, 0.5], [0.0, 0.0]]).double())


def test_coefficients_and_scale_reach_the_cores() -> None:
    experts = group([[1.0, 1.0], [1.0, 1.0]], [[0.5, -0.5], [-0.5, 0.5]])
    weighted = TensorGroup("w", experts.experts, torch.tensor([2.0, 4.0]).double(), experts.base)
    inner = {"name": "ties", "density": 1.0}
    merged = CoreSpace.model_validate({"of": inner, "scale": 0.5}).merge(weighted)
    due = 0.5 * torch.tensor([[4.0, 0.0], [0.0, 4.0]]).double()
    assert torch.allclose(merged - experts.required_base, due)


def test_directions_are_weighed_by_the_roots_of_their_lengths() -> None:
    # B and A of 4 e_1 f_1' and of the product of (3, 4) / 5 and (1, 1) / 2^.5, by hand; TIES with
    # density 1/2 sees how the axes lie
    root = 0.5**0.5
    experts = group([[4.0, 0.0], [0.0, 0.0]], [[0.6 * root, 0.6 * root], [0.8 * root, 0.8 * root]])
    b = torch.tensor([[2.0, 0.6], [0.0, 0.8]]).double()
    a = torch.tensor([[2.0, 0.0], [root, root]]).double()
    left, right = torch.linalg.svd(b).U, torch.linalg.svd(a).Vh.T
    due = torch.zeros(2, 2, dtype=torch.float64)
    for expert in experts.experts:
        core = left.T @ (expert - experts.required_base) @ right
        kept = core.abs() >= core.abs().flatten().sort().values[-2]
        due = due + left @ (core * kept) @ right.T
    merged = CoreSpace(of=Ties(density=0.5, combine="sum")).merge(experts)
    assert torch.allclose(merged - experts.required_base, due)
