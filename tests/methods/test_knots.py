import torch

from mergewell.methods.knots import Knots
from mergewell.methods.ties import Ties
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[list[float]]) -> TensorGroup:
    taus = [torch.tensor(tau, dtype=torch.float64) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    ones = torch.ones(len(taus), dtype=torch.float64)
    return TensorGroup("w", tuple(base + tau for tau in taus), ones, base)


def test_worked_example() -> None:
    # U = (1, 1) and (1, -1) over 2^.5; the coordinates are rows (2^.5, 2^.5) and (.5^.5, -.5^.5)
    # of different directions, which do not meet
    experts = group([[1.0, 1.0], [1.0, 1.0]], [[0.5, -0.5], [-0.5, 0.5]])
    merged = Knots(of=Ties(density=1.0)).merge(experts) - experts.required_base
    assert torch.allclose(merged, torch.tensor([[1.5, 0.5], [0.5, 1.5]]).double())


def test_inputs_stay_as_they_are() -> None:
    # one output direction (1, 1) / 2^.5: TIES sees (1, 1) against (.5, -.5), times 2^.5
    experts = group([[1.0, 1.0], [1.0, 1.0]], [[0.5, -0.5], [0.5, -0.5]])
    merged = Knots(of=Ties(density=1.0)).merge(experts) - experts.required_base
    assert torch.allclose(merged, torch.tensor([[0.75, 1.0], [0.75, 1.0]]).double())


def test_directions_are_weighed_by_what_all_experts_have_of_them() -> None:
    # the directions (1, 0) and (3, 4) / 5 share U: its columns are those of the sum of squares,
    # so that TIES with density 1/2 keeps the longer coordinate of each expert only
    experts = group([[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.6], [0.0, 0.8]])
    side = torch.cat([e - experts.required_base for e in experts.experts], dim=1)
    left = torch.linalg.svd(side).U
    due = torch.zeros(2, 2, dtype=torch.float64)
    for expert in experts.experts:
        coordinates = left.T @ (expert - experts.required_base)
        kept = coordinates.abs() >= coordinates.abs().flatten().sort().values[-2]
        due = due + left @ (coordinates * kept)
    merged = Knots(of=Ties(density=0.5, combine="sum")).merge(experts)
    assert torch.allclose(merged - experts.required_base, due)
