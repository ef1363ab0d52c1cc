"""Small networks and samples for the three analyses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergewell.labelled import LabelledInputs, cut


def samples(count: int, *, seed: int = 0) -> LabelledInputs:
    """Three classes of 1x6x6 images around distinct means."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 36, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(3, (count,), generator=generator)
    noise = 1.5 * torch.randn(count, 36, generator=generator)
    return cut((means[labels] + noise).reshape(count, 1, 6, 6), labels, 64)


def trained(module: nn.Module, *, seed: int, steps: int = 60) -> nn.Module:
    data = samples(600, seed=seed)
    inputs = torch.cat(list(data.batches))  # pyright: ignore
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    module.train()
    for _ in range(steps):
        chosen = torch.randint(600, (32,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs[chosen]), data.labels[chosen])  # pyright: ignore
        loss.backward()
        optimizer.step()
    return module.eval()


def two_layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


def with_batch_norm(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )


class TinyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patch(x[:, 0])).mean(1))


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return TinyViT()


@pytest.fixture(scope="session", params=[two_layers, with_batch_norm, vit])
def experts(request: pytest.FixtureRequest) -> dict[str, nn.Module]:
    """Three experts of one start, whatever the architecture."""
    return {f"expert {seed}": trained(request.param(0), seed=seed) for seed in (1, 2, 3)}


@pytest.fixture
def data() -> LabelledInputs:
    return samples(200, seed=50)


@pytest.fixture
def choosing() -> LabelledInputs:
    return samples(200, seed=60)
