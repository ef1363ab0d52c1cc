from dataclasses import replace

import torch
from laws import group_of as random_group

from mergewell.methods.dare import Dare
from mergewell.methods.m_dare import MDare
from mergewell.methods.m_ties import MTies
from mergewell.tensor_group import TensorGroup

RANKS = {"m_loss_rank": torch.tensor([0.0, 1.0], dtype=torch.float64)}


def test_worked_example_trims_measured_rows_and_leaves_them_unscaled() -> None:
    base = torch.zeros(2, 4)
    expert = torch.tensor([[4.0, -3.0, 2.0, 1.0], [4.0, -3.0, 2.0, 1.0]])
    tensors = TensorGroup("w", (expert,), torch.ones(1), base, calibration=RANKS)
    # densities 0.75 and 0.25
    mixed = MDare(density=0.5, spread=0.5).merge(tensors)
    assert mixed.tolist() == [[4.0, -3.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0]]
    scaled = MDare(density=0.5, spread=0.5, rescale="density").merge(tensors)
    torch.testing.assert_close(scaled, mixed / torch.tensor([[0.75], [0.25]]))
    nothing = MDare(density=0.1, spread=1.0, rescale="density").merge(tensors)
    assert nothing[1].tolist() == [0.0] * 4  # a density of 0 divides nothing


def test_measured_rows_are_those_of_m_ties() -> None:
    tensors = replace(random_group(MDare(), (2, 30)), calibration=RANKS)
    guided = MDare(density=0.4, spread=0.3).merge(tensors)
    assert torch.equal(guided, MTies(density=0.4, spread=0.3).merge(tensors))


def test_other_tensors_get_dare() -> None:
    tensors = random_group(MDare(), (20, 30))
    method = MDare(density=0.4).for_tensor("w", shape=(4, 4), guided=False)
    assert torch.equal(method.merge(tensors), Dare(density=0.4).merge(tensors))
    none = MDare(density=0.4, rescale="none").for_tensor("w", shape=(4, 4), guided=False)
    expected = Dare(density=0.4, rescale="none").merge(tensors)
    assert torch.equal(none.merge(tensors), expected)
