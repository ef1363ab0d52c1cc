import torch

from mergewell.methods.metagpt import Metagpt
from mergewell.methods.wise_ft import WiseFt
from mergewell.tensor_group import TensorGroup


def group(name: str, *task_vectors: list[float]) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    return TensorGroup(name, tuple(base + tau for tau in taus), torch.ones(len(taus)), base)


def test_worked_example_over_the_whole_model() -> None:
    groups = [group("a", [3.0, 0.0], [0.0, 1.0]), group("b", [1.0], [1.0])]
    method = Metagpt()
    (statistic,) = method.statistics()
    values = statistic.measure(groups)
    first = TensorGroup(
        "a", groups[0].experts, groups[0].coefficients, groups[0].base,
        statistics={statistic: values["a"]},
    )  # fmt: skip
    # squared norms 9 + 1 and 1 + 1
    merged = method.merge(first)
    torch.testing.assert_close(merged, torch.tensor([10 + 3 * 10 / 12, 10 + 2 / 12]))


def test_worked_example_of_one_tensor() -> None:
    merged = Metagpt(scope="tensor").merge(group("a", [3.0, 0.0], [0.0, 1.0]))
    torch.testing.assert_close(merged, torch.tensor([12.7, 10.1]))


def test_equal_norms_reduce_to_the_average() -> None:
    tensors = group("a", [3.0, 4.0], [-5.0, 0.0])
    average = WiseFt(t=1.0).merge(tensors)
    torch.testing.assert_close(Metagpt(scope="tensor").merge(tensors), average)
