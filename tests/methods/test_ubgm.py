"""UBGM: by hand, its special cases in the paper, and removal."""

from __future__ import annotations

from dataclasses import replace

import torch

from mergewell.methods.fisher import Fisher
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ubgm import Ubgm
from mergewell.tensor_group import TensorGroup


def group(
    base: list[float], own: list[list[float]], *, samples: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> TensorGroup:
    start = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    taus = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]])]
    return TensorGroup(
        "w",
        tuple(start + tau for tau in taus),
        torch.ones(2, dtype=torch.float64),
        start,
        calibration={
            "fisher": torch.tensor(own, dtype=torch.float64)[:, None],
            "fisher_base": torch.tensor([base], dtype=torch.float64),
            "fisher_samples": torch.tensor(samples, dtype=torch.float64),
        },
    )


def test_worked_example() -> None:
    # H_0 = 1, H_1 = 2, H_2 = 5, all summed over samples: H = 8; (3 * 1 + 6 * 4) / 8 = 3.375
    # H_0 = 1, H_1 = 1, H_2 = 2: H = 4; (2 * 2 + 3 * -2) / 4 = -0.5
    made = group([0.5, 0.5], [[2, 1], [2.5, 1]], samples=(2.0, 1.0, 2.0))
    found = Ubgm().merge(made)
    torch.testing.assert_close(found, torch.tensor([[5.375, 1.5]], dtype=torch.float64))
    # the base's information of 1 sample, not 2: (2.5 * 1 + 5.5 * 4) / 7.5
    fewer = Ubgm(base_samples=1).merge(made)[0, 0].item()
    assert abs(fewer - (2 + 24.5 / 7.5)) < 1e-9


def test_without_the_experts_information_it_is_task_arithmetic() -> None:
    made = group([0.5, 3], [[0, 0], [0, 0]])
    wanted = TaskArithmetic(scale=0.7).merge(made)
    torch.testing.assert_close(Ubgm(scale=0.7).merge(made), wanted)
    torch.testing.assert_close(Ubgm(scale=0.7).merge(replace(made, calibration={})), wanted)


def test_without_the_base_s_information_it_is_fisher_merging() -> None:
    made = group([0, 0], [[2, 1], [5, 0.5]])
    torch.testing.assert_close(Ubgm().merge(made), Fisher().merge(made))


def test_an_expert_that_was_added_can_be_removed() -> None:
    made = group([1, 2], [[2, 1], [5, 0.5]])
    both = Ubgm().merge(made)
    # what is left of the sum when the second is taken away again is the first, alone
    alone = replace(made, coefficients=torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(Ubgm().merge(alone), made.experts[0])
    assert float((both - made.experts[0]).abs().min()) > 0.1
    removed = replace(made, coefficients=torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert bool(Ubgm().merge(removed).isfinite().all())
