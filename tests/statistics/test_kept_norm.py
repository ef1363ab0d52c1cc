import torch

from mergewell.statistics.kept_norm import KeptNorm
from mergewell.tensor_group import TensorGroup


def group() -> TensorGroup:
    base = torch.zeros(20, 30)
    torch.manual_seed(0)
    return TensorGroup("w", (torch.randn(20, 30), torch.randn(20, 30)), torch.ones(2), base)


def test_norms_are_those_of_the_masks_whatever_the_probability() -> None:
    tensors = group()
    for statistic in (KeptNorm(density=(0.3, 0.8)), KeptNorm(density=0.5, spread=(0.1, 0.4))):
        value = statistic.measure([tensors])["w"]
        for expert, tau in enumerate(tensors.task_vectors):
            kept = tau.abs().double()[statistic.keep(tensors, expert)].sum()
            torch.testing.assert_close(value["whole"][expert], tau.abs().double().sum())
            torch.testing.assert_close(value["kept"][expert], kept)


def test_density_one_keeps_everything_whatever_the_spread() -> None:
    value = KeptNorm(density=1.0, spread=0.2).measure([group()])["w"]
    assert torch.equal(value["whole"], value["kept"])
