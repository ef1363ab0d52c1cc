"""Splitting a module into features and classifier, whatever it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.explain.split import find_classifier, run_split, soup


class TinyViT(nn.Module):
    """Patches, a class token, one block; the head is not the last attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.patch = nn.Linear(4, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), 1, 8), self.patch(x)], 1)
        return self.head(self.block(tokens)[:, 0])


class Transposed(nn.Module):
    """A linear layer that keeps its matrix as [inputs, outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Mapped(nn.Module):
    """Returns what a Hugging Face classifier returns: logits by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(torch.relu(self.body(pixels * mask)))}


def test_the_last_linear_layer_is_found_by_what_it_returns() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert find_classifier(mlp, torch.randn(2, 4)) == "2"
    assert find_classifier(TinyViT(), torch.randn(2, 5, 4)) == "head"
    batch = {"pixels": torch.randn(2, 4), "mask": torch.ones(2, 4)}
    assert find_classifier(Mapped(), batch) == "fc"
    assert find_classifier(nn.Sequential(nn.ReLU(), Transposed()), torch.randn(2, 4)) == "1"


@pytest.mark.parametrize("make", [TinyViT, lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 3))])
def test_the_head_makes_the_logits_of_the_features(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = make()
    batch = torch.randn(7, 5, 4)
    name = find_classifier(module, batch[:2])
    found = run_split(module, name, batch.split(3))
    assert found.features.shape[0] == found.logits.shape[0] == 7
    assert torch.allclose(found.head(found.features), found.logits, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(module.eval()(batch).double(), found.logits, atol=1e-6)


def test_a_transposed_head_is_turned() -> None:
    module = nn.Sequential(Transposed())
    found = run_split(module, "0", [torch.randn(5, 4)])
    assert torch.equal(found.head.weight, module[0].weight.detach().double().T)


def test_what_cannot_be_split_is_refused_and_names_the_last_layer() -> None:
    soft = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    with pytest.raises(ModelError, match="the last linear layer called is '0'"):
        find_classifier(soft, torch.randn(2, 4))
    with pytest.raises(ModelError, match=r"returns \(2, 5, 3\) and not one row of logits"):
        find_classifier(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 5, 4))
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(ModelError, match="the output of '0' is not the module's output"):
        find_classifier(two, torch.randn(2, 4), name="0")
    with pytest.raises(ModelError, match="no linear layer '3': known: 0, 1"):
        find_classifier(two, torch.randn(2, 4), name="3")
    with pytest.raises(ModelError, match="no layer '7'"):
        run_split(two, "7", [torch.randn(2, 4)])


def test_a_soup_is_the_mean_and_keeps_integers_of_the_first() -> None:
    left, right = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        left.weight.fill_(1.0), right.weight.fill_(4.0)
        right.running_mean.fill_(2.0), left.num_batches_tracked.fill_(3)
    merged = soup([left, right])
    assert merged.weight.item() == 2.5
    assert merged.running_mean.item() == 1.0
    assert merged.num_batches_tracked.item() == 3
    assert soup([left, right], [1.0, 0.0]).weight.item() == 1.0
    assert left.weight.item() == 1.0
    with pytest.raises(ModelError, match="weight differs in shape"):
        soup([nn.Linear(2, 2), nn.Linear(3, 2)])
