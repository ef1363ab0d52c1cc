import pytest
import torch
from laws import ALWAYS, UNLESS_SAID
from pydantic import ValidationError

from mergewell.errors import RecipeError
from mergewell.methods.lines import Lines
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties
from mergewell.statistics.depth import LAYER_PATTERN, layer_number
from mergewell.tensor_group import TensorGroup


def group(name: str, size: int = 1) -> TensorGroup:
    base = torch.zeros(size)
    return TensorGroup(name, (base + 4, base + 2), torch.ones(2), base)


def test_worked_example_rises_with_depth() -> None:
    method = Lines(layers=3, beta=1.0)  # alpha 1/2: factors 0.5, 1, 1.5 on the sum of 6
    merged = [float(method.merge(group(f"model.layers.{i}.mlp.weight"))) for i in range(3)]
    assert merged == [3.0, 6.0, 9.0]
    assert float(method.merge(group("embed.weight"))) == 3.0
    tuned = Lines(layers=3, alpha=0.25, beta=0.75, scale=2.0)
    assert float(tuned.merge(group("model.layers.2.mlp.weight"))) == 12.0


def test_number_of_layers_is_found_in_the_names() -> None:
    groups = [group("embed.weight"), *(group(f"layers.{i}.weight") for i in (0, 4, 2))]
    method = Lines(beta=1.0)
    (statistic,) = method.statistics()
    values = statistic.measure(groups)
    assert int(values["embed.weight"]["layers"]) == 5
    deepest = TensorGroup(
        "layers.4.weight", groups[0].experts, torch.ones(2), groups[0].base,
        statistics={statistic: values["layers.4.weight"]},
    )  # fmt: skip
    assert float(method.merge(deepest)) == 9.0


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11),
        ("bert.encoder.layer.3.output.dense.bias", 3),
        ("blocks.0.norm1.weight", 0),
        ("transformer.h.7.mlp.c_fc.weight", 7),
        ("visual.transformer.resblocks.2.ln_1.bias", 2),
        ("features.3.weight", None),
        ("classifier.weight", None),
    ],
)
def test_layer_numbers_of_common_names(name: str, number: int | None) -> None:
    assert layer_number(LAYER_PATTERN, name) == number


def test_reduces_to_task_arithmetic_and_to_ties() -> None:
    tensors = group("layers.1.weight", 5)
    flat = Lines(layers=2, alpha=0.3, beta=0.0)
    torch.testing.assert_close(flat.merge(tensors), TaskArithmetic(scale=0.3).merge(tensors))
    ties = Lines(layers=2, beta=0.0, density=0.4, combine="agreeing")
    assert torch.equal(ties.merge(tensors), Ties(density=0.4).merge(tensors))


def test_a_layer_beyond_the_given_number_and_bad_patterns_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"layers\.3\.weight"):
        Lines(layers=3).merge(group("layers.3.weight"))
    with pytest.raises(ValidationError, match="needs a group"):
        Lines(layer_pattern="layers")
    with pytest.raises(ValidationError, match="no regular expression"):
        Lines(layer_pattern="layers(")


@pytest.mark.parametrize("law", [*ALWAYS, *UNLESS_SAID], ids=lambda law: law.__name__)
@pytest.mark.parametrize("combine", ["sum", "agreeing"])
def test_keeps_the_laws_when_the_number_of_layers_is_given(law, combine: str) -> None:
    # the conformance suite leaves out methods that need the whole model, as this does by default
    law(Lines(layers=2, combine=combine))
    law(Lines(layers=2, combine=combine, density=0.5))
