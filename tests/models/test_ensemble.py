import math

import pytest
import torch
from torch import nn

from mergewell.errors import ModelError, RecipeError
from mergewell.models.ensemble import Ensemble, ensemble_outputs, run_batch, simplex


class Named(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left - right


def constant(*values: float) -> nn.Linear:
    """A module that gives `values` for every row of one feature."""
    module = nn.Linear(1, len(values))
    nn.init.zeros_(module.weight)
    module.bias.data = torch.tensor(values)
    return module


def test_features_and_logits_are_plain_means():
    outputs = [torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, -2.0]])]
    for kind in ("features", "logits"):
        assert torch.equal(ensemble_outputs(outputs, kind), torch.tensor([[2.0, 1.0]]))


def test_coefficients_scale_each_expert_by_its_own():
    outputs = [torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, -2.0]])]
    mean = ensemble_outputs(outputs, "logits", coefficients=[0.75, 0.25])
    assert torch.equal(mean, torch.tensor([[1.5, 2.5]]))


def test_probabilities_average_softmaxes_and_return_their_logarithm():
    # softmaxes (3/4, 1/4) and (1/4, 3/4), shares 1/4 and 3/4: 3/8 and 5/8
    outputs = [torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[7.0, 7.0 + math.log(3.0)]])]
    log_mean = ensemble_outputs(outputs, "probabilities", coefficients=[0.25, 0.75])
    assert torch.allclose(log_mean.exp(), torch.tensor([[0.375, 0.625]]), atol=1e-6)


def test_the_three_kinds_differ_where_one_expert_is_sure():
    outputs = [torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 4.0]])]
    assert ensemble_outputs(outputs, "logits").argmax() == 0
    assert ensemble_outputs(outputs, "probabilities").argmax() == 1


def test_a_coefficient_of_zero_removes_an_expert():
    outputs = [torch.randn(3, 5, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    alone = ensemble_outputs(outputs, "probabilities", coefficients=[0.0, 1.0])
    assert torch.allclose(alone, outputs[1].log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("experts", [1, 2, 3, 7])
def test_equal_outputs_come_back_bitwise(experts: int):
    output = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ensemble_outputs([output] * experts, "features"), output)


def test_inputs_are_left_alone():
    outputs = [torch.ones(2, 2), torch.zeros(2, 2)]
    ensemble_outputs(outputs, "features")
    assert torch.equal(outputs[0], torch.ones(2, 2))


def test_the_module_averages_what_its_experts_return():
    ensemble = Ensemble([constant(1.0, 5.0), constant(3.0, 1.0)], kind="logits")
    assert torch.equal(ensemble(torch.zeros(2, 1)), torch.tensor([[2.0, 3.0]] * 2))
    assert ensemble.kind == "logits" and "kind='logits'" in repr(ensemble)


def test_named_inputs_reach_the_arguments_of_their_names():
    batch = {"right": torch.tensor([1.0]), "left": torch.tensor([5.0])}
    assert torch.equal(Ensemble([Named()], kind="features")(batch), torch.tensor([4.0]))


@pytest.mark.parametrize(
    ("coefficients", "word"),
    [([0.5, 0.6], "sum to 1"), ([-0.5, 1.5], "0 or more"), ([1.0], "give one each")],
)
def test_coefficients_off_the_simplex_are_refused(coefficients: list[float], word: str):
    with pytest.raises(RecipeError, match=word):
        simplex(coefficients, 2)


def test_not_a_number_is_off_the_simplex():
    with pytest.raises(RecipeError):
        simplex([math.nan, 1.0], 2)


def test_an_ensemble_of_nothing_is_refused():
    with pytest.raises(RecipeError, match="no experts"):
        Ensemble([], kind="logits")


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(RecipeError, match="features, logits, probabilities"):
        ensemble_outputs([torch.ones(1)], "votes")  # pyright: ignore[reportArgumentType]


def test_outputs_of_different_shapes_are_refused_rather_than_broadcast():
    with pytest.raises(ModelError, match=r"\(1, 2\), \(3, 2\)"):
        ensemble_outputs([torch.ones(3, 2), torch.ones(1, 2)], "features")


def test_a_module_that_returns_no_tensor_is_named():
    with pytest.raises(ModelError, match="LSTM returns tuple"):
        run_batch(nn.LSTM(2, 2), torch.ones(1, 2))
