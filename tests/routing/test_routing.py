"""Routers of low-rank experts: what they compute, on linear maps and convolutions of any module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mergewell.companions.base import Companion, expert_state, write_companion
from mergewell.companions.emr import Emr
from mergewell.companions.mass import Mass
from mergewell.companions.smile import Smile
from mergewell.errors import ModelError, RecipeError
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.restore import restore_expert
from mergewell.routing.load import Routed, route
from mergewell.run import run
from mergewell.storage.checkpoint import open_checkpoint

TURNED = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Net(nn.Module):
    """A padded and a pointwise convolution, a norm, a turned and a tied linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, stride=2, padding_mode="circular")
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 1, bias=False)
        self.turned = TURNED(7, 8)
        self.third = nn.Linear(7, 7)
        self.third_again = nn.Linear(7, 7, bias=False)
        self.third_again.weight = self.third.weight

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = functional.gelu(self.norm(self.depthwise(self.first(x))))
        x = functional.gelu(self.second(x)).flatten(2).mT.contiguous()  # positions
        x = functional.gelu(self.third(self.turned(x)))
        return {"out": self.third_again(x).mean(1), "all": (x,), "none": None}


def states(count: int, make: Any = Net) -> list[dict[str, Tensor]]:
    """A base and experts around it, all tensors moved."""
    made: list[dict[str, Tensor]] = []
    torch.manual_seed(0)
    base = make().eval()
    for row in range(count + 1):
        module = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(row)
        for tensor in module.state_dict().values():
            if row and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
        made.append({n: t.clone() for n, t in module.state_dict().items() if "again" not in n})
    return made


def routed(
    folder: Path,
    companion: Companion,
    given: list[dict[str, Tensor]],
    make: Any = Net,
    method: str = "average",
) -> tuple[Routed, Path]:
    """A router of an average, in a folder that was made so, and that folder."""
    paths: list[Path] = []
    for row, state in enumerate(given):
        paths.append(folder / f"m{row}.safetensors")
        save_file(state, paths[-1])
    recipe = {
        "base": str(paths[0]),
        "experts": [{"path": str(path)} for path in paths[1:]],
        "method": {"name": method},
    }
    plan = make_plan(make_recipe(recipe))
    run(plan, folder / "merged", workers=1)
    tasks = [f"t{row}" for row in range(1, len(given))]
    name = f"{companion.component_name()}.companion.safetensors"
    write_companion(companion, plan, tasks, folder / "merged" / name)
    return route(make().eval(), folder / "merged"), folder / "merged"


def loaded(state: dict[str, Tensor]) -> nn.Module:
    module = Net().eval()
    module.load_state_dict(state, strict=False)
    return module


def inputs(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("companion", [Smile(rank=99), Smile(rank=99, per="sample"), Mass()])
@torch.no_grad()
def test_one_expert_of_full_rank_is_that_expert(tmp_path: Path, companion: Companion) -> None:
    given = states(1)
    made, folder = routed(tmp_path, companion, given)
    want, got = loaded(given[1])(inputs()), made.module(inputs())
    assert torch.allclose(got["out"], want["out"], atol=1e-5)
    assert torch.allclose(got["all"][0], want["all"][0], atol=1e-5) and got["none"] is None
    assert made.layers == 5 and made.absent == ()  # the tied weight twice
    assert not torch.allclose(loaded(given[0])(inputs())["out"], want["out"], atol=1e-2)
    restore_expert(folder, "t1", tmp_path / "back")
    for name, tensor in open_checkpoint(tmp_path / "back").items():
        assert torch.allclose(tensor, given[1][name], atol=1e-5), name


@torch.no_grad()
def test_no_directions_leave_the_base_where_it_routes(tmp_path: Path) -> None:
    given = states(2)
    made, folder = routed(tmp_path, Smile(rank=0), given)
    merged = dict(open_checkpoint(folder))
    kept = ("norm", "depthwise")
    state = {n: merged[n] if n.startswith(kept) else t for n, t in given[0].items()}
    assert torch.equal(made.module(inputs())["out"], loaded(state)(inputs())["out"])
    assert (made.parameters, made.added) == (0, 0.0)


@torch.no_grad()
def test_all_experts_alike_are_the_average_of_the_low_rank_ones(tmp_path: Path) -> None:
    given = states(3)
    made, folder = routed(tmp_path, Smile(rank=2, top=3, weigh="equal"), given)
    path = folder / "smile.companion.safetensors"
    merged = open_checkpoint(folder)
    experts = [expert_state(merged, path, f"t{row}") for row in (1, 2, 3)]
    state = {
        n: torch.stack([e[n] for e in experts]).mean(0) if t.is_floating_point() else t
        for n, t in experts[0].items()
    }
    assert torch.allclose(made.module(inputs())["out"], loaded(state)(inputs())["out"], atol=1e-5)
    moved = experts[0]["turned.weight"] - given[0]["turned.weight"]
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 2


class Two(nn.Module):
    """One linear map of the inputs as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def apart() -> list[dict[str, Tensor]]:
    """A zero base, and experts that see the first two and the last two inputs."""
    base = {"map.weight": torch.zeros(3, 4), "map.bias": torch.zeros(3)}
    given = [base]
    for row in range(2):
        weight = torch.zeros(3, 4)
        weight[:2, 2 * row : 2 * row + 2] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        given.append({"map.weight": weight, "map.bias": torch.full((3,), 10.0 * (row + 1))})
    return given


X = torch.tensor([[1.0, 2, 0.1, 0], [0, 0.1, 4, 1], [2, 1, 0, 0]])


@pytest.mark.parametrize(
    "companion",
    [Smile(rank=2, router_rank=2), Mass(density=1.0, threshold=0.6), Mass(density=1, most=1)],
)
@torch.no_grad()
def test_every_sample_goes_through_the_expert_that_sees_it(
    tmp_path: Path, companion: Companion
) -> None:
    made, _ = routed(tmp_path, companion, apart(), Two)
    want = [[13.0, 12, 10], [32, 21, 20], [16, 11, 10]]
    assert torch.allclose(made.module(X), torch.tensor(want), atol=1e-5)


@torch.no_grad()
def test_a_router_of_fewer_directions_sees_less(tmp_path: Path) -> None:
    made, _ = routed(tmp_path, Smile(rank=2, router_rank=1), apart(), Two)
    x = torch.tensor([[0.1, 2.0, 0.5, 0]])  # the first expert sees more, the second ahead
    assert torch.allclose(made.module(x), torch.tensor([[21.5, 20, 20]]))


@torch.no_grad()
def test_softmax_of_norms_weighs_the_chosen(tmp_path: Path) -> None:
    made, _ = routed(tmp_path, Smile(rank=2, top=2), apart(), Two)
    a, b = torch.tensor([2.0, 1.0]).softmax(0).tolist()
    want = torch.tensor([[a * 16 + b * 23, a * 10 + b * 20, a * 10 + b * 20]])
    assert torch.allclose(made.module(torch.tensor([[2.0, 0, 1, 0]])), want, atol=1e-5)


@torch.no_grad()
def test_a_batch_is_merged_of_all_that_hold_it(tmp_path: Path) -> None:
    made, _ = routed(tmp_path, Mass(density=1.0, per="batch", temperature=9.0), apart(), Two)
    # directions of the two are orthogonal on the right and the same on the left: polar of [U U]
    left = torch.eye(3)[:, :2] / 2**0.5
    weight = torch.cat([left @ torch.diag(torch.tensor([3.0, 1.0]))] * 2, 1)
    assert torch.allclose(made.module(X), X @ weight.T + 15, atol=1e-5)
    assert made.passes == 2 and made.parameters == 15 + 2 * 3 * (3 + 1 + 4) + 6


def test_what_cannot_be_routed_is_named(tmp_path: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

    with pytest.raises(ModelError, match=r"attention.in_proj_weight .* exclude"):
        routed(tmp_path, Smile(), states(1, Hidden), Hidden)


def test_masks_route_nothing_and_vectors_are_no_matrices(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="routes matrices"):
        routed(tmp_path, Smile(exclude="map"), apart(), Two)
    (tmp_path / "emr").mkdir()
    with pytest.raises(ModelError, match="emr masks, which"):
        routed(tmp_path / "emr", Emr(), apart(), Two, method="emr")
