import torch

from mergewell.methods.localize_and_stitch import LocalizeAndStitch
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties
from mergewell.tensor_group import TensorGroup


def group(name: str, *task_vectors: list[float]) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    return TensorGroup(name, tuple(base + tau for tau in taus), torch.ones(len(taus)), base)


def test_worked_example() -> None:
    # density 0.5 keeps [4, -3, 0, 0] and [2, 0, 0, 5]: the first entry is averaged
    tensors = group("w", [4.0, -3.0, 1.0, 2.0], [2.0, 1.0, 0.0, 5.0])
    method = LocalizeAndStitch(density=0.5, trim_scope="tensor")
    assert method.merge(tensors).tolist() == [13.0, 7.0, 10.0, 15.0]


def test_the_budget_is_that_of_the_whole_model() -> None:
    groups = [group("a", [4.0, 3.0]), group("b", [1.0, 2.0])]
    method = LocalizeAndStitch(density=0.5)
    (statistic,) = method.statistics()
    values = statistic.measure(groups)
    merged = [
        method.merge(
            TensorGroup(
                g.name, g.experts, g.coefficients, g.base, statistics={statistic: values[g.name]}
            )
        ).tolist()
        for g in groups
    ]
    assert merged == [[14.0, 13.0], [10.0, 10.0]]


def test_density_one_reduces_to_the_average_and_agreeing_signs_to_ties() -> None:
    tensors = group("w", [4.0, -3.0, 1.0], [2.0, 1.0, -5.0])
    average = TaskArithmetic(scale=0.5).merge(tensors)
    assert torch.equal(LocalizeAndStitch(density=1.0).merge(tensors), average)
    agreeing = group("w", [4.0, 3.0, 1.0, 2.0], [2.0, 1.0, 3.0, 5.0])
    stitched = LocalizeAndStitch(density=0.5, trim_scope="tensor").merge(agreeing)
    assert torch.equal(stitched, Ties(density=0.5).merge(agreeing))
