"""Fisher merging: by hand, its reductions, and from a calibration of toy models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergewell.methods.average import Average
from mergewell.methods.fisher import Fisher
from mergewell.models.fisher import squared_gradients
from mergewell.tensor_group import TensorGroup


def group(
    experts: list[list[list[float]]], fisher: list[list[list[float]]] | None, **more: object
) -> TensorGroup:
    known = {} if fisher is None else {"fisher": torch.tensor(fisher, dtype=torch.float64)}
    made = TensorGroup(
        "w",
        tuple(torch.tensor(expert) for expert in experts),
        torch.ones(len(experts)),
        torch.zeros(len(experts[0]), len(experts[0][0])),
        calibration=known,
    )
    return replace(made, **more)  # pyright: ignore[reportArgumentType]


EXPERTS = [[[1.0, 2.0, 3.0]], [[5.0, 6.0, 9.0]]]


def test_worked_example() -> None:
    # (3 * 1 + 1 * 5) / 4, (0 * 2 + 2 * 6) / 2, nobody's answers depend on the last: the mean
    made = group(EXPERTS, [[[3, 0, 0]], [[1, 2, 0]]])
    torch.testing.assert_close(Fisher(floor=0).merge(made), torch.tensor([[2.0, 6.0, 6.0]]))
    torch.testing.assert_close(Fisher().merge(made), torch.tensor([[2.0, 6.0, 6.0]]))
    # with coefficients 1 and 3: (3 * 1 + 3 * 5) / 6
    weighed = replace(made, coefficients=torch.tensor([1.0, 3.0]))
    assert Fisher().merge(weighed)[0, 0].item() == 3.0
    # a floor of 6 above all information is the average
    torch.testing.assert_close(Fisher(floor=6).merge(made), Average().merge(made))


def test_equal_information_is_the_average_and_one_alone_is_its_expert() -> None:
    torch.manual_seed(0)
    known = torch.rand(1, 1, 3).double()
    made = group(EXPERTS, [[[1, 1, 1]]] * 2)
    made = replace(made, calibration={"fisher": known.expand(2, -1, -1)})
    torch.testing.assert_close(Fisher().merge(made), Average().merge(made))
    alone = group(EXPERTS, [[[1, 1, 1]], [[0, 0, 0]]])
    torch.testing.assert_close(Fisher(floor=0).merge(alone), torch.tensor(EXPERTS[0]))
    same = group([EXPERTS[0]] * 2, [[[3, 0, 0]], [[1, 2, 0]]])
    assert torch.equal(Fisher().merge(same), torch.tensor(EXPERTS[0]))


def test_rows_may_be_merged_apart_and_what_is_not_known_is_averaged() -> None:
    method = Fisher()
    assert method.needs.granularity == "row" and method.needs.calibration == ("fisher",)
    plain = method.for_tensor("w", shape=(4, 4), guided=False)
    assert plain.needs.granularity == "element" and not plain.needs.calibration
    made = group(EXPERTS, None)
    torch.testing.assert_close(plain.merge(made), Average().merge(made))


def squares_by_hand(x: Tensor, weight: Tensor) -> Tensor:
    """Return E_y (d log p(y | x) / d W)^2 of softmax(W x), exactly, over all answers."""
    p = (weight @ x).softmax(0)
    total = torch.zeros_like(weight)
    for y, chance in enumerate(p):
        gradient = torch.outer(torch.eye(len(p))[y] - p, x)
        total += chance * gradient.square()
    return total


def test_drawn_answers_have_the_expected_squares() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, bias=False)
    x = torch.randn(1, 3)
    found = squared_gradients(layer, x.expand(600, 3), "classes", first=0)["weight"] / 600
    wanted = squares_by_hand(x[0], layer.weight.detach())
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=1e-3)
    # a Gaussian's answers: E (sum_c noise_c d f_c)^2 = x^2 in every row
    found = squared_gradients(layer, x.expand(600, 3), "features", first=0)["weight"] / 600
    torch.testing.assert_close(found, x.square().expand(2, 3), rtol=0.15, atol=1e-3)


def test_answers_depend_on_the_sample_s_number_alone() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(3, 4), torch.randn(5, 3)
    whole = squared_gradients(layer, x, "classes", first=7)
    torch.manual_seed(9)
    parts = [
        squared_gradients(layer, x[:2], "classes", first=7),
        squared_gradients(layer, x[2:], "classes", first=9),
    ]
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], tensor)
    other = squared_gradients(layer, x, "classes", first=8)["weight"]
    assert not torch.allclose(other, whole["weight"])
    assert layer.weight.grad is None and layer.weight.requires_grad


def test_padding_has_no_answer() -> None:
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Embedding(5, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            del attention_mask
            return self.head(input_ids)

    torch.manual_seed(0)
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = squared_gradients(Tokens(), batch, "classes", first=0)["head.weight"]
    assert [bool(row.any()) for row in found] == [False, True, True, False, False]
