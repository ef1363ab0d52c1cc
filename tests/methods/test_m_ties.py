"""M-TIES: rows by hand, its reductions, and the released algorithm written anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import group_of as random_group
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mergewell.calibration.collect import calibrate
from mergewell.calibration.data import Data
from mergewell.calibration.file import write_calibration
from mergewell.methods import ops
from mergewell.methods.m_ties import MTies
from mergewell.methods.ties import Ties
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[list[float]], rank: list[float] | None = None) -> TensorGroup:
    base = torch.full((len(task_vectors[0]), len(task_vectors[0][0])), 10.0)
    experts = tuple(base + torch.tensor(tau) for tau in task_vectors)
    known = {"m_loss_rank": torch.tensor(rank, dtype=torch.float64)} if rank else {}
    return TensorGroup("w", experts, torch.ones(len(experts)), base, calibration=known)


EXAMPLE = group(
    [[4.0, -3.0, 2.0, 1.0], [4.0, -3.0, 2.0, 1.0], [4.0, -3.0, 2.0, 1.0]],
    [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]],
    rank=[0.0, 0.5, 1.0],
)


def test_worked_example() -> None:
    # density 0.5, spread 0.5: rows keep 0.75, 0.5 and 0.25 of their four entries: 3, 2 and 1
    # row 0: [4, -3, 2, 0] and [0, 2, 3, 4]: signs +, -, +, +: 4, -3, (2 + 3) / 2, 4
    # row 1: [4, -3, 0, 0] and [0, 0, 3, 4]: 4, -3, 3, 4;  row 2: [4, 0, 0, 0] and [0, 0, 0, 4]
    assert MTies(density=0.5, spread=0.5).merge(EXAMPLE).tolist() == [
        [14.0, 7.0, 12.5, 14.0], [14.0, 7.0, 13.0, 14.0], [14.0, 10.0, 10.0, 14.0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "densities"),
    [
        ("neutral", [0.6, 0.5, 0.4]),
        ("rank", [0.5, 0.4, 0.3]),
        ("reversed", [0.4, 0.5, 0.6]),
        ("uniform", [0.5, 0.5, 0.5]),
        ("layer_aware", [0.45, 0.35, 0.25]),  # about 0.5 + 0.3 * (1/2 - 1)
    ],
)
def test_budgets(budget: str, densities: list[float]) -> None:
    known = {**EXAMPLE.calibration, "m_loss_layer_rank": torch.tensor(1.0, dtype=torch.float64)}
    method = MTies.model_validate(
        {"density": 0.5, "spread": 0.2, "budget": budget, "layer_spread": 0.3}
    )
    found = method.row_densities(replace(EXAMPLE, calibration=known))
    torch.testing.assert_close(found, torch.tensor(densities, dtype=torch.float64))


def test_densities_stay_between_0_and_1_and_a_row_may_keep_nothing() -> None:
    method = MTies(density=0.2, spread=1.0)
    assert method.row_densities(EXAMPLE).tolist() == pytest.approx([0.7, 0.2, 0.0])
    # 0.2 of four entries is none, where whole-tensor trimming keeps one
    assert method.merge(EXAMPLE)[1:].tolist() == [[10.0] * 4] * 2


def test_random_places_are_a_permutation_of_the_seed_and_the_name_alone() -> None:
    method = MTies(density=0.5, spread=0.8, budget="random")
    wide = random_group(method, (101, 3))
    found = method.row_densities(wide)
    expected = 0.5 + 0.8 * (0.5 - torch.arange(101, dtype=torch.float64) / 100)
    torch.testing.assert_close(found.sort(descending=True).values, expected)
    assert torch.equal(found, method.row_densities(wide))
    assert not torch.equal(found, method.row_densities(replace(wide, seed=1)))
    assert not torch.equal(found, method.row_densities(replace(wide, name="other")))
    part = replace(
        wide, experts=tuple(e[10:20] for e in wide.experts), base=wide.required_base[10:20],
        offset=30, numel=303,
    )  # fmt: skip
    assert torch.equal(method.row_densities(part), found[10:20])


def test_equal_magnitudes_are_kept_from_the_front_or_all() -> None:
    tensors = group([[1.0, -1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]], rank=[0.0, 1.0])
    exact = MTies(density=0.5, spread=0.0)
    assert exact.merge(tensors).tolist() == [[11.0, 9.0, 10.0, 10.0], [11.0, 11.0, 10.0, 10.0]]
    kept = exact.model_copy(update={"ties": "keep"})
    assert kept.merge(tensors).tolist() == [[11.0, 9.0, 11.0, 10.0], [11.0] * 4]
    none = MTies(density=0.1, spread=0.1, ties="keep").merge(tensors)
    assert none.tolist() == [[10.0] * 4] * 2


def test_without_spread_it_is_ties_by_rows_whatever_the_places() -> None:
    tensors = replace(
        random_group(MTies(), (6, 10)), calibration={"m_loss_rank": torch.rand(6).double()}
    )
    by_rows = replace(tensors, experts=tuple(
        tensors.required_base + ops.trim_rows(tau, 0.3) for tau in tensors.task_vectors
    ))  # fmt: skip
    expected = Ties(density=1.0).merge(by_rows)
    for budget in ("neutral", "rank", "reversed", "random", "uniform"):
        method = MTies.model_validate({"density": 0.3, "spread": 0.0, "budget": budget})
        torch.testing.assert_close(method.merge(tensors), expected, rtol=0, atol=1e-6)


def test_density_1_without_spread_is_election_and_disjoint_mean() -> None:
    tensors = random_group(MTies(), (6, 10))
    expected = Ties(density=1.0).merge(tensors)
    assert torch.equal(MTies(density=1.0, spread=0.0).merge(tensors), expected)


def test_tensors_that_are_not_guided_get_ties_as_a_whole() -> None:
    tensors = random_group(MTies(), (6, 10))
    method = MTies(density=0.3).for_tensor("w", shape=(4, 4), guided=False)
    assert method.needs.granularity == "element" and not method.needs.calibration
    assert torch.equal(method.merge(tensors), Ties(density=0.3).merge(tensors))


def test_layers_restrict_what_is_guided() -> None:
    method = MTies(layers=(1, 2))
    guided = [
        method.for_tensor(name, shape=(4, 4), guided=True).needs.calibration
        for name in ("layers.0.w", "layers.1.w", "layers.2.w", "head.w")
    ]
    assert guided == [(), ("m_loss",), ("m_loss",), ()]


class Vit(nn.Module):
    """A small ViT with the names of the released code's CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.resblocks = nn.ModuleList(VitBlock() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).mT
        for block in self.resblocks:
            hidden = block(hidden)
        return hidden.mean(1)


class VitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(16, 40), "c_proj": nn.Linear(40, 16)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.scaled_dot_product_attention(*self.qkv(self.first(x)).chunk(3, -1))
        inner = functional.gelu(self.mlp["c_fc"](self.second(x)), approximate="tanh")
        return x + self.mlp["c_proj"](inner)


def released(
    base: dict[str, Tensor], experts: list[dict[str, Tensor]], images: Tensor, k: float, e: float
) -> dict[str, Tensor]:
    """Return what the released M-TIES gives (papers.md 1.4), written after its description."""
    model, merged = Vit().eval(), {}
    model.load_state_dict(base)
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if name.endswith("c_fc"):
            layer.register_forward_hook(lambda _m, args, _o, n=name: seen.update({n: args[0]}))
    with torch.no_grad():
        model(images)
    for name, start in base.items():
        taus = torch.stack([(x[name] - start).double() for x in experts])
        if name.endswith("c_fc.weight"):
            layer = name.removesuffix(".weight")
            zs = torch.stack([
                seen[layer].double() @ x[name].double().T + x[f"{layer}.bias"].double()
                for x in experts
            ])  # fmt: skip
            gelu = nn.GELU(approximate="tanh")
            m = (gelu(zs.mean(0)) - gelu(zs).mean(0)).square().mean((0, 1))
            rank = m.argsort().argsort().double() / (len(m) - 1)
            for i, r in enumerate(rank):
                n = int(start.shape[1] * (k - e * float(r)))
                for tau in taus[:, i]:
                    tau[tau.abs() < (tau.abs().sort(descending=True).values[n - 1])] = 0
        else:
            for tau in taus.flatten(1):
                n = int(tau.numel() * k)
                tau[tau.abs() < tau.abs().sort(descending=True).values[n - 1]] = 0
        plus, minus = taus.clamp(min=0).sum(0), -taus.clamp(max=0).sum(0)
        agrees = taus.sign() == torch.where(plus >= minus, 1.0, -1.0)
        mean = (taus * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        merged[name] = (start.double() + mean).float()
    return merged


def test_the_released_algorithm_gives_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(12, 3, 16, 16)
    states: list[dict[str, Tensor]] = [Vit().state_dict()]
    for _ in range(3):
        moved = {n: t + 0.1 * torch.randn_like(t) for n, t in states[0].items()}
        states.append(moved)
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    common: dict[str, Any] = {
        "base": str(paths[0]),
        "experts": [{"path": str(path)} for path in paths[1:]],
    }
    data = Data(Vit, images.split(6), 12, mode="pretrained")
    found = calibrate(make_plan(make_recipe(common)), data)
    write_calibration(tmp_path / "c.safetensors", found)
    method = {"name": "m_ties", "density": 0.8, "spread": 0.3, "budget": "rank", "ties": "keep"}
    plan = make_plan(
        make_recipe({**common, "method": method, "calibration": str(tmp_path / "c.safetensors")})
    )
    assert [n for n, t in plan.tasks.items() if t.calibration] == [
        f"resblocks.{i}.mlp.c_fc.weight" for i in range(3)
    ]
    expected = released(states[0], states[1:], images, 0.8, 0.3)
    merged = dict(merge_tensors(plan))
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    other = make_plan(plan.recipe.model_copy(update={"method": plan.recipe.method.model_copy(
        update={"budget": "reversed"})}))  # fmt: skip
    changed = dict(merge_tensors(other))
    assert not torch.allclose(
        changed["resblocks.0.mlp.c_fc.weight"], expected["resblocks.0.mlp.c_fc.weight"], atol=1e-3
    )
