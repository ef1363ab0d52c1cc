"""Re-estimated BatchNorm statistics: exact, joinable, and better for averages of live ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError, ModelError
from mergewell.explain.split import soup
from mergewell.labelled import LabelledInputs, accuracy
from mergewell.models.batch_norm import moments, reestimate, set_moments
from mergewell.statistics.base import joined


def images(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes of 8x8 images: a noisy bright quarter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pictures = 1.8 * torch.randn(count, 1, 8, 8, generator=generator)
    for place, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        pictures[place, 0, row : row + 4, column : column + 4] += 1.0
    return pictures, labels


def live_net(*, seed: int) -> nn.Module:
    """A convolutional network with BatchNorm and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4),
    )  # fmt: skip


def trained(module: nn.Module, *, seed: int, steps: int = 120) -> nn.Module:
    """Train in training mode, so that the running statistics live."""
    pictures, labels = images(1000, seed=seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.train()
    for step in range(steps):
        part = slice(32 * (step % 30), 32 * (step % 30) + 32)
        optimizer.zero_grad()
        functional.cross_entropy(module(pictures[part]), labels[part]).backward()
        optimizer.step()
    return module.eval()


def test_one_batch_gives_its_own_mean_and_unbiased_variance() -> None:
    norm = nn.BatchNorm1d(2)
    values = torch.tensor([[1.0, 10.0], [2.0, 10.0], [6.0, 40.0]])
    done = reestimate(nn.Sequential(norm), [values])
    assert norm.running_mean.tolist() == [3.0, 20.0]
    assert norm.running_var.tolist() == [7.0, 300.0]
    assert done.layers == ("0",)


def test_the_statistics_are_pooled_over_unequal_batches() -> None:
    """The mean over batches of the batch variances would be 0 here."""
    norm = nn.BatchNorm1d(1)
    reestimate(nn.Sequential(norm), [torch.zeros(2, 1), torch.full((4, 1), 3.0)])
    assert norm.running_mean.item() == 2.0
    assert norm.running_var.item() == pytest.approx(12 / 5)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d(3), (5, 3, 4)), (nn.BatchNorm2d(3), (5, 3, 2, 2)),
     (nn.BatchNorm3d(3), (5, 3, 2, 2, 2))],
)  # fmt: skip
def test_channels_are_the_second_dimension(norm: nn.Module, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    reestimate(nn.Sequential(norm), [values])
    rows = values.transpose(0, 1).flatten(1)
    assert torch.allclose(norm.running_mean, rows.mean(1), atol=1e-6)
    assert torch.allclose(norm.running_var, rows.var(1), atol=1e-6)


def test_two_halves_joined_are_the_whole() -> None:
    whole, parts = live_net(seed=0), live_net(seed=0)
    batches = list(images(256, seed=3)[0].split(64))
    reestimate(whole, batches)
    set_moments(parts, joined(moments(parts, batches[:2]), moments(parts, batches[2:])))
    for (name, left), right in zip(
        whole.state_dict().items(), parts.state_dict().values(), strict=True
    ):
        assert torch.allclose(left, right, rtol=1e-6, atol=0), name


def test_momentum_is_torch_training_without_dropout() -> None:
    ours, theirs = live_net(seed=0), live_net(seed=0)
    batches = list(images(96, seed=3)[0].split(32))
    reestimate(ours, batches, momentum=0.3)
    for part in theirs.modules():
        part.training = isinstance(part, nn.BatchNorm2d)
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.3
    with torch.no_grad():
        for batch in batches:
            theirs(batch)
    for place in (1, 5):
        assert torch.allclose(ours[place].running_mean, theirs[place].running_mean, atol=1e-6)
        assert torch.allclose(ours[place].running_var, theirs[place].running_var, atol=1e-6)


def test_weights_modes_and_counters_stay() -> None:
    module = live_net(seed=0).train()
    module[1].eval()
    before = copy.deepcopy(module)
    reestimate(module, [images(64, seed=3)[0]])
    for name, tensor in before.state_dict().items():
        same = torch.equal(tensor, module.state_dict()[name])
        assert same is not name.endswith(("running_mean", "running_var")), name
    modes = [part.training for part in module.modules()]
    assert modes == [part.training for part in before.modules()]
    assert all(part.track_running_stats for part in (module[1], module[5]))


def test_an_average_of_live_networks_is_mended() -> None:
    """Experts from different starts: activations of their average have far too little variance."""
    experts = [trained(live_net(seed=seed), seed=seed) for seed in (7, 8)]
    pictures, labels = images(800, seed=9)
    data = LabelledInputs(tuple(pictures.split(200)), labels)
    merged = soup(experts)
    before = accuracy(merged, data)
    reestimate(merged, images(400, seed=11)[0].split(200))
    assert all(accuracy(expert, data) > 0.75 for expert in experts)
    assert accuracy(merged, data) > before + 0.1


def test_a_module_without_batch_norm_is_refused_in_one_sentence() -> None:
    with pytest.raises(ModelError, match="Sequential has no BatchNorm with running statistics"):
        reestimate(nn.Sequential(nn.Linear(2, 2)), [torch.zeros(2, 2)])
    with pytest.raises(ModelError, match="has no BatchNorm"):
        reestimate(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), [torch.zeros(2, 2)])


def test_data_that_cannot_be_used_are_refused() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(DataError, match="no batches"):
        reestimate(module, [])
    with pytest.raises(DataError, match="Layer 0 gets one value a channel"):
        reestimate(module, [torch.zeros(1, 2)])
    with pytest.raises(DataError, match="Layer 0 sees values that are not finite"):
        reestimate(module, [torch.tensor([[1.0, torch.nan], [0.0, 0.0]])])
    assert module[0].running_mean.tolist() == [0.0, 0.0]
    assert module[0].track_running_stats


def test_a_batch_norm_that_is_not_reached_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    done = reestimate(Idle(), [torch.randn(4, 2)])
    assert done.layers == ("used",)
    assert done.untouched == {"idle": "not reached by the forward pass"}
