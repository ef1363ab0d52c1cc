"""ZipIt: pairs within and across two models, and what becomes of their weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from permutable import ResNet, mlp, shaken
from safetensors.torch import save_file
from torch import Tensor, nn

from mergewell.alignment.align import aligned
from mergewell.alignment.tracing import permutation_graph
from mergewell.alignment.zipit import paired, zipped
from mergewell.cli.main import main
from mergewell.errors import DataError, ModelError
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import read_manifest

pytest.importorskip("scipy")


def images(count: int = 32) -> Tensor:
    return torch.randn(
        count, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )


def halved(one: nn.Module, two: nn.Module) -> dict[str, Tensor]:
    states = two.state_dict()
    return {n: (t + states[n]) / 2 for n, t in one.state_dict().items() if t.is_floating_point()}


def test_the_most_alike_are_joined_first_by_hand() -> None:
    first = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    across = torch.tensor([[0.95, 0.3, 0.0], [0.2, 0.5, 0.1], [0.0, 0.6, 0.4]])
    second = torch.tensor([[1.0, 0.8, 0.7], [0.8, 1.0, 0.3], [0.7, 0.3, 1.0]])
    # 0.95 joins a0 and b0 (not 0.9: a0 is taken); 0.6 a2 and b1; a1 and b2 are left
    one, two = paired(across, first, second)
    assert one.tolist() == [0, 2, 1] and two.tolist() == [0, 1, 2]
    within = paired(across.clamp(max=0.2), first, second)  # a0 a1, then b0 b1, then a2 b2
    assert [table.tolist() for table in within] == [[0, 0, 2], [1, 1, 2]]


def test_models_that_repeat_their_own_units_are_joined_without_loss() -> None:
    """Each has two features, twice: four units hold all four, and outputs are the mean."""
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2))
    for module, order in ((one, [0, 1, 0, 1]), (two, [1, 1, 0, 0])):
        for tensor in (module[0].weight, module[0].bias):
            tensor.data = tensor.data[order].clone()
    x = torch.randn(50, 6)
    with torch.no_grad():
        want = (one(x) + two(x)) / 2
        across = copy.deepcopy(two)
        zipped(one, across, [x], pairs="across")
        assert not torch.allclose(across(x), want, atol=1e-2)
        done = zipped(one, two, [x])
        assert torch.allclose(two(x), want, atol=1e-5)
    assert done.within == 1.0 and done.across == ()


@pytest.mark.parametrize("make", [ResNet, mlp])
def test_pairs_across_are_the_average_with_the_aligned_expert(make: type[nn.Module]) -> None:
    x = images() if make is ResNet else images()[:, 0, :1, :4].flatten(1)
    one, two = shaken(make()), shaken(make(), seed=1)
    moved = copy.deepcopy(two)
    aligned(one, moved, [x], match="activations")
    done = zipped(one, two, [x], pairs="across")
    want = halved(one, moved)
    assert all(torch.allclose(two.state_dict()[name], tensor) for name, tensor in want.items())
    assert done.within == 0.0 and set(done.across) == set(done.graph.groups)


def test_a_permuted_copy_is_joined_to_the_same_function() -> None:
    one = shaken(ResNet())
    graph = permutation_graph(one, images(2))
    two = copy.deepcopy(one)
    two.load_state_dict(graph.permuted(one.state_dict(), graph.random(seed=2)))
    done = zipped(one, two, [images()])
    assert torch.allclose(two(images(4)), one(images(4)), atol=1e-9)
    assert done.within == 0.0 and done.across == ()


class Attention(nn.Module):
    """Two heads between two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.qkv, self.leave = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(torch.tanh(self.enter(x))).unflatten(-1, (3, 2, 4)).movedim(-3, 0)
        q, k, v = (part.transpose(-2, -3) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.leave(mixed.transpose(-2, -3).flatten(-2))


def test_heads_are_matched_across_and_the_rest_is_joined() -> None:
    one, two = shaken(Attention()), shaken(Attention(), seed=1)
    x = torch.randn(16, 3, 5, dtype=torch.float64)
    done = zipped(one, two, [x])
    assert "enter.weight:0" not in done.across and len(done.across) >= 2
    before = (one(x) - two(x)).abs().mean()
    assert before > 0.01 and torch.isfinite(two(x)).all()
    with pytest.raises(ModelError, match="one architecture"):
        wide = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        zipped(wide, nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), [torch.rand(4, 6)])
    with pytest.raises(DataError, match="two or more"):
        zipped(one, two, [])


def test_the_command_writes_the_merged_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = shaken(ResNet()).float(), shaken(ResNet(), seed=1).float()
    for name, module in {"a": one, "b": two}.items():
        state = {"head.scale": torch.full((2,), 1.0 if name == "a" else 4.0), **module.state_dict()}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    save_file({"x": images().float()}, tmp_path / "x.safetensors")
    command = [str(tmp_path / "b"), "--to", str(tmp_path / "a"), "--zip", "--json"]
    rest = ["--model-factory", "permutable:ResNet", "--out", str(tmp_path / "out")]
    data = ["--data", str(tmp_path / "x.safetensors")]
    assert main(["align", *command, *rest]) == 2 and "add --data" in capsys.readouterr().err
    assert main(["align", *command, *rest, *data]) == 0
    told = json.loads(capsys.readouterr().out)
    zipped(one, two, [images().float()])
    found = open_checkpoint(tmp_path / "out")
    state = two.state_dict()
    assert all(torch.allclose(found[n], t, atol=1e-5) for n, t in state.items())
    assert found["head.scale"].tolist() == [2.5, 2.5]
    assert told["samples"] == 32 and 0 < told["within"] < 1
    assert read_manifest(tmp_path / "out").model_dump()["zipit"]["pairs"] == "any"
