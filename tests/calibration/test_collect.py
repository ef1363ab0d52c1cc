"""One walk gives what plain passes over whole modules give, in memory and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, cnn, images, randomised
from safetensors.torch import save_file
from torch import Tensor, nn

from mergewell.calibration.collect import calibrate
from mergewell.calibration.data import Data, Memory
from mergewell.calibration.result import Calibration
from mergewell.check import build_module
from mergewell.errors import DataError, RecipeError
from mergewell.flags import recipe_from_flags
from mergewell.models.capture import measure_m_loss
from mergewell.models.dataflow import Batch, call, evaluating, tensors
from mergewell.models.trace import trace
from mergewell.plan import Plan, make_plan
from mergewell.run import merge_tensors

OUTSIDE = Memory(weights=0, activations=0)
COEFFICIENTS = (0.25, 0.75)


def planned(folder: Path, factory: Any, *, method: str = "average", base: bool = True) -> Plan:
    """Write a base and two experts near it; return the plan that merges them."""
    start = randomised(factory(), 0, 0.1)
    paths = [folder / "base", folder / "one", folder / "two"]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        path.mkdir(parents=True)
        state = {
            name: (value + 0.05 * seed * torch.randn(value.shape, generator=generator)).abs()
            if "var" in name
            else value + 0.05 * seed * torch.randn(value.shape, generator=generator)
            for name, value in start.items()
            if value.is_floating_point()
        }
        save_file({**start, **state}, path / "model.safetensors")
    experts = [f"{path}:{c}" for path, c in zip(paths[1:], COEFFICIENTS, strict=True)]
    return make_plan(
        recipe_from_flags(
            base=str(paths[0]) if base else None, experts=experts, method=method, settings=[]
        )
    )


def modules(plan: Plan, factory: Any) -> list[nn.Module]:
    """Return base, experts and merged model, whole."""
    found = [build_module(factory, checkpoint) for checkpoint in plan.inputs]
    return [*found, build_module(factory, dict(merge_tensors(plan)))]


def data(name: str, *, batches: int = 3, **more: Any) -> Data:
    torch.manual_seed(1)
    factory, inputs = ARCHITECTURES[name]
    cut = tuple(inputs(5) for _ in range(batches))
    return Data(factory, cut, 5 * batches, **more)


def states_are_close(left: Calibration, right: Calibration, tolerance: float = 1e-5) -> None:
    assert left.states.keys() == right.states.keys()
    for key, state in left.states.items():
        other = right.states[key]
        assert state.keys() == other.keys()
        for part, tensor in state.items():
            torch.testing.assert_close(tensor, other[part], rtol=tolerance, atol=1e-12)


def output_gap(experts: list[nn.Module], merged: nn.Module, batches: Sequence[Batch]) -> float:
    """Distance of the merged model's output from the ensemble's, by plain passes."""
    gap = energy = 0.0
    with evaluating([merged, *experts]):
        for batch in batches:
            own = [tensors(call(model, batch))[0].double() for model in (*experts, merged)]
            ensemble = sum(c * output for c, output in zip(COEFFICIENTS, own, strict=False))
            gap += float((own[-1] - ensemble).square().sum())
            energy += float(ensemble.square().sum())
    return (gap / energy) ** 0.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_out_of_core_is_in_memory_is_plain(name: str, tmp_path: Path) -> None:
    used = data(name)
    plan = planned(tmp_path, used.factory)
    inside, outside = calibrate(plan, used), calibrate(plan, used, memory=OUTSIDE)
    states_are_close(inside, outside)
    assert inside.head == outside.head and inside.seen == 15
    base, *experts, merged = modules(plan, used.factory)
    plain = measure_m_loss(
        experts, trace(base, used.batches[0]), batches=used.batches, coefficients=COEFFICIENTS,
        merged=merged, base=base,
    )  # fmt: skip
    assert [layer.layer for layer in plain] == [layer.layer for layer in outside.m_loss]
    assert plain
    for one, other in zip(plain, outside.m_loss, strict=True):
        assert other.relative == pytest.approx(one.relative, rel=1e-5)
        torch.testing.assert_close(other.node, one.node, rtol=1e-5, atol=1e-12)
    gap = output_gap(experts, merged, used.batches)
    assert outside.output_gap == pytest.approx(gap, rel=1e-5)
    assert len(outside.head.blocks) == 3 and gap > 0


@pytest.mark.parametrize("mode", ["merged", "pretrained", "mean", "own"])
@pytest.mark.parametrize("name", ["llama", "cnn"])
def test_every_mode_and_kind_equals_plain_passes(name: str, mode: Any, tmp_path: Path) -> None:
    kinds = ("activation", "gated", "attention", "norm", "block", "output")
    used = data(name, batches=2, mode=mode, kinds=kinds)
    plan = planned(tmp_path, used.factory)
    found = calibrate(plan, used, memory=OUTSIDE)
    base, *experts, merged = modules(plan, used.factory)
    mean = {n: sum(e[n] for e in plan.experts) / 2 for n in plan.experts[0]}
    plain = measure_m_loss(
        experts, trace(base, used.batches[0]), batches=used.batches, coefficients=COEFFICIENTS,
        mode=mode, kinds=kinds[:-1], merged=merged, base=base,
        average=build_module(used.factory, {n: t.to(base_dtype(plan, n)) for n, t in mean.items()}),
    )  # fmt: skip
    wanted = {layer.layer: layer for layer in plain}
    got = {layer.layer: layer for layer in found.m_loss}
    output = got.pop("(output)")
    assert output.kind == "output"
    if name == "cnn":  # where nothing is padding, which only M-Loss leaves out
        assert output.relative == pytest.approx(found.output_gap, rel=1e-5)
    assert got.keys() == wanted.keys() and len({layer.kind for layer in plain}) >= 2
    for key, layer in wanted.items():
        assert got[key].relative == pytest.approx(layer.relative, rel=2e-5), key


def base_dtype(plan: Plan, name: str) -> torch.dtype:
    return plan.reference.spec(name).dtype


def test_features_moments_drift_and_cka_by_hand(tmp_path: Path) -> None:
    """A plain hook on every block of whole modules sees the same."""
    used = data("bert", batches=2)
    plan = planned(tmp_path, used.factory)
    found = calibrate(plan, used, memory=OUTSIDE)
    all_models = modules(plan, used.factory)
    block = "encoder.layer.1"
    hidden: list[list[Tensor]] = []
    for model in all_models:
        seen: list[Tensor] = []
        layer = model.get_submodule(block)
        layer.register_forward_hook(lambda *a, seen=seen: seen.append(tensors(a[-1])[0]))
        with evaluating([model]):
            for batch in used.batches:
                call(model, batch)
        hidden.append(seen)
    masks = [batch["attention_mask"].bool() for batch in used.batches]
    assert not all(mask.all() for mask in masks)
    rows = [torch.cat([h[m] for h, m in zip(own, masks, strict=True)]).double() for own in hidden]
    pooled = [
        torch.cat([torch.stack([t[k].mean(0) for t, k in zip(h, m, strict=True)])
                   for h, m in zip(own, masks, strict=True)])
        for own in hidden
    ]  # fmt: skip
    torch.testing.assert_close(found.features[block], torch.stack(pooled), rtol=1e-5, atol=1e-6)
    moments = found.value("moments", block)
    wanted = torch.stack([own.mean(0) for own in rows])
    torch.testing.assert_close(moments["mean"], wanted, rtol=1e-4, atol=1e-6)
    wanted = torch.stack([own.var(0, correction=0) for own in rows])
    torch.testing.assert_close(moments["variance"], wanted, rtol=1e-4, atol=1e-6)
    drift = found.drift[block]
    for index in range(2):
        gap = (rows[1 + index] - rows[0]).norm() / rows[0].norm()
        assert float(drift["experts"][index]) == pytest.approx(float(gap), rel=1e-5)
    ensemble = 0.25 * rows[1] + 0.75 * rows[2]
    gap = (rows[3] - ensemble).norm() / ensemble.norm()
    assert float(drift["merged"]) == pytest.approx(float(gap), rel=1e-4)
    assert found.cka[block].shape == (4, 4) and found.outputs is None
    torch.testing.assert_close(found.cka[block].diagonal(), torch.ones(4).double())


def test_convolutional_blocks_count_channels_and_outputs_are_kept(tmp_path: Path) -> None:
    used = data("cnn", gram=True)
    plan = planned(tmp_path, cnn)
    found = calibrate(plan, used, memory=OUTSIDE)
    assert found.features["blocks.0"].shape == (4, 15, 8)
    outputs = found.outputs
    assert outputs is not None and outputs.shape == (4, 15, 5)
    whole = modules(plan, cnn)
    with evaluating(whole):
        wanted = torch.stack([torch.cat([m(batch) for batch in used.batches]) for m in whole])
    torch.testing.assert_close(outputs, wanted)
    gram = found.value("gram", "head/expert 2")
    assert gram["gram"].shape == (8, 8) and float(gram["count"]) == 15
    assert "gram/head/base" not in found.states


@pytest.mark.parametrize("name", ["bert", "cnn"])
def test_shards_join_to_the_whole_in_any_order(name: str, tmp_path: Path) -> None:
    used = data(name, batches=5)
    plan = planned(tmp_path, used.factory)
    whole = calibrate(plan, used)
    shards = [calibrate(plan, used, shard=(index, 3)) for index in range(3)]
    assert [sorted(shard.done) for shard in shards] == [[0, 3], [1, 4], [2]]
    joined = shards[2].join(shards[0]).join(shards[1])
    assert joined.done == whole.done and joined.seen == 25
    for block, features in whole.features.items():
        assert torch.equal(joined.features[block], features)
        torch.testing.assert_close(joined.cka[block], whole.cka[block])
    assert joined.output_gap == pytest.approx(whole.output_gap, rel=1e-9)
    for one, other in zip(joined.m_loss, whole.m_loss, strict=True):
        assert one.relative == pytest.approx(other.relative, rel=1e-9)
        torch.testing.assert_close(one.node, other.node)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    used = data("cnn", batches=2)
    plan, other = planned(tmp_path / "a", cnn), planned(tmp_path / "b", cnn, method="ties")
    first = calibrate(plan, used, shard=(0, 2))
    with pytest.raises(DataError, match="both hold batch 0 of the data"):
        first.join(calibrate(plan, used, shard=(0, 1)))
    with pytest.raises(DataError, match="different models"):
        first.join(calibrate(other, used, shard=(1, 2)))
    with pytest.raises(DataError, match="different modes"):
        first.join(calibrate(plan, data("cnn", batches=2, mode="pretrained"), shard=(1, 2)))
    moved = Data(cnn, (used.batches[0], used.batches[1] + 1), 10)
    with pytest.raises(DataError, match="different data"):
        first.join(calibrate(plan, moved, shard=(1, 2)))
    with pytest.raises(DataError, match=r"only one holds gram/blocks\.0\.bn1/expert 1"):
        first.join(calibrate(plan, data("cnn", batches=2, gram=True), shard=(1, 2)))
    with pytest.raises(DataError, match="Shard 2/3 gets none of the 2 batches"):
        calibrate(plan, used, shard=(2, 3))
    with pytest.raises(RecipeError, match="name it with --base"):
        calibrate(planned(tmp_path / "c", cnn, base=False), used)


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    plan = planned(tmp_path, cnn)
    broken = images(4)
    broken[0, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match="not finite"):
        _ = calibrate(plan, Data(cnn, (broken,), 4)).m_loss


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    used = data("cnn", batches=2)
    calibrate(planned(tmp_path, cnn), used, on_step=lambda *step: seen.append(step))
    done = [number for _, number, _ in seen]
    assert done == sorted(done) and seen[-1] == ("activations", seen[0][2], seen[0][2])


def test_an_ordinary_net_without_blocks_is_one_block(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()

    plan = planned(tmp_path, net)
    found = calibrate(plan, Data(net, (torch.randn(6, 4), torch.randn(6, 4)), 12), memory=OUTSIDE)
    assert found.head.blocks == ("(output)",) and found.outputs is not None
    assert torch.equal(found.features["(output)"], found.outputs)
    assert [layer.layer for layer in found.m_loss] == ["0"]


class Late(nn.Module):
    """Two convolutions; the BatchNorm of the first one's output stands in the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Early(3) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean((2, 3))


class _Early(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.norm(x)))


def test_a_batch_norm_in_the_next_block_is_read_with_its_layer(tmp_path: Path) -> None:
    def late() -> nn.Module:
        return Late().eval()

    used = Data(late, (images(4), images(4)), 8)
    plan = planned(tmp_path, late)
    inside, outside = calibrate(plan, used), calibrate(plan, used, memory=OUTSIDE)
    assert [unit.batch_norm for unit in outside.head.units] == ["blocks.1.norm", "blocks.2.norm"]
    assert all(layer.relative > 0 for layer in outside.m_loss)
    states_are_close(inside, outside)
