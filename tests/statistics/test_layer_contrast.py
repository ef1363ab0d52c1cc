import pytest
import torch

from mergewell.statistics.layer_contrast import LayerContrast
from mergewell.tensor_group import TensorGroup


def group(name: str, base: list, *taus: list) -> TensorGroup:
    wide = torch.tensor(base, dtype=torch.float64)
    experts = tuple(wide + torch.tensor(tau, dtype=torch.float64) for tau in taus)
    return TensorGroup(name, experts, torch.ones(len(taus), dtype=torch.float64), wide)


def test_worked_example() -> None:
    # base diag(1, 1): effective rank 2, and it commutes with symmetric matrices. diag(1, 0) has
    # rank 1. J = [[0, -1], [1, 0]] has rank 2; J' - J = -2 J: (sqrt(8) + sqrt(8)) / (2 * 2)
    first = group(
        "layers.0.w", [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]], [[0.0, -1.0], [1.0, 0.0]]
    )
    second = group(
        "layers.3.w", [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0] * 3] * 2, [[1.0] * 3] * 2
    )
    outside = group("conv.w", [[3.0, 0.0], [0.0, 0.0]], [[1.0] * 2] * 2, [[1.0] * 2] * 2)
    vector = group("layers.1.bias", [1.0], [1.0], [2.0])
    values = LayerContrast().measure([first, second, outside, vector])
    value = values["layers.0.w"]
    assert int(value["row"]) == 1  # in the order of the names
    assert value["contrast"][1].tolist() == pytest.approx([2.0, 1.0])
    assert value["conflict"][1].tolist() == pytest.approx([0.0, 8**0.5 / 2])
    assert value["contrast"][2].tolist() == pytest.approx([0.0, 1.0])
    assert value["depth"].tolist() == [1.0, 0.25, 1.0]
    assert int(values["layers.1.bias"]["row"]) == -1


def test_a_model_of_vectors_has_no_rows() -> None:
    values = LayerContrast().measure([group("bias", [1.0], [1.0])])
    assert int(values["bias"]["row"]) == -1
