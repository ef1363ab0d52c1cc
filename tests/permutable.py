"""Small networks whose units can be permuted, with weights that no accident makes alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def shaken(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return a module with random parameters and buffers everywhere, in eval mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if name.endswith("running_var") else noise - 0.5)
    return module.eval().double()


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """A stem, three residual blocks, and a linear layer on the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(Residual(8, 8), Residual(8, 12, 2), Residual(12, 12))
        self.fc = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(torch.relu(self.stem(x)))
        return self.fc(functional.avg_pool2d(x, 2).flatten(1))


class Joined(nn.Module):
    """Branches that are joined, split unevenly and gated; a grouped convolution; a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(2, 4, 1), nn.Conv1d(2, 6, 1)
        self.grouped = nn.Conv1d(10, 10, 3, padding=1, groups=5)
        self.norm = nn.GroupNorm(5, 10)
        self.gates = nn.Conv1d(10, 12, 1)
        self.out = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.norm(torch.tanh(self.grouped(x)))
        gate, value = self.gates(x).chunk(2, 1)
        return self.out(functional.silu(gate) * value)


def mlp() -> nn.Module:
    """Return two hidden layers of 8 and 6 units, the second with BatchNorm."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    )
