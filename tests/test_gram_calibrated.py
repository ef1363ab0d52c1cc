"""From inputs to a merge: calibrated toy models, merged by RegMean, are their least squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, cnn, randomised
from safetensors.torch import save_file
from torch import Tensor, nn

from mergewell.calibration.collect import calibrate
from mergewell.calibration.data import Data, Memory
from mergewell.calibration.file import join_calibrations, write_calibration
from mergewell.calibration.forward import calibrate_forward
from mergewell.errors import DataError, PlanError
from mergewell.methods.regmean_plus_plus import RegMeanPlusPlus
from mergewell.models.dataflow import call, evaluating
from mergewell.models.fisher import squared_gradients
from mergewell.plan import Plan, make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors


def checkpoints(folder: Path, factory: Any, experts: int = 2) -> dict[str, Any]:
    """Write a base and experts near it; return what a recipe says of them."""
    folder.mkdir(exist_ok=True)
    start = randomised(factory(), 0, 0.1)
    paths = [folder / f"{number}.safetensors" for number in range(experts + 1)]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: value + 0.2 * seed * torch.randn(value.shape, generator=generator)
            if value.is_floating_point() and "running" not in name
            else value
            for name, value in start.items()
        }
        save_file(state, path)
    return {"base": str(paths[0]), "experts": [{"path": str(path)} for path in paths[1:]]}


def data(name: str, *, batches: int = 4, **more: Any) -> Data:
    torch.manual_seed(1)
    factory, inputs = ARCHITECTURES[name]
    return Data(factory, tuple(inputs(6) for _ in range(batches)), 6 * batches, gram=True, **more)


def planned(models: dict[str, Any], file: Path, method: dict[str, Any]) -> Plan:
    return make_plan(make_recipe({**models, "method": method, "calibration": str(file)}))


def layer_inputs(plan: Plan, used: Data, layer: str) -> list[Tensor]:
    """Return what a layer of each whole expert is given on the expert's own batches, no padding."""
    found: list[Tensor] = []
    for number, checkpoint in enumerate(plan.experts):
        module = used.factory()
        module.load_state_dict({n: checkpoint[n] for n in checkpoint}, strict=False)
        module.tie_weights() if hasattr(module, "tie_weights") else None
        seen: list[Tensor] = []
        module.get_submodule(layer).register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0])
        )
        with evaluating([module]):
            for owner, batch in zip(used.owners, used.batches, strict=True):
                if owner != number:
                    continue
                call(module, batch)
                if not isinstance(batch, Tensor):
                    seen[-1] = seen[-1][batch["attention_mask"].bool()]
        found.append(torch.cat([part.detach() for part in seen]))
    return found


def least_squares(inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return the [O, I] nearest to all weights [O, I] on the rows of their own inputs [R, I]."""
    rows = torch.cat([x.double() / len(x) ** 0.5 for x in inputs])
    wanted = torch.cat(
        [x.double() @ w.double().T / len(x) ** 0.5 for x, w in zip(inputs, weights, strict=True)]
    )
    return torch.linalg.lstsq(rows, wanted).solution.T


@pytest.mark.parametrize(
    ("name", "layer", "memory"),
    [
        ("bert", "encoder.layer.1.attention.self.query", None),
        ("bert", "encoder.layer.2.output.dense", Memory(weights=0, activations=0)),
        ("llama", "model.layers.2.mlp.down_proj", None),
    ],
)
def test_regmean_is_least_squares_on_what_each_expert_saw_of_its_task(
    name: str, layer: str, memory: Memory | None, tmp_path: Path
) -> None:
    used = data(name, owners=(0, 1, 1, 0))
    models = checkpoints(tmp_path / "models", used.factory)
    file = tmp_path / "c.safetensors"
    write_calibration(file, calibrate(make_plan(make_recipe(models)), used, memory=memory))
    plan = planned(models, file, {"name": "regmean", "alpha": 1.0})
    weight = f"{layer}.weight"
    inputs = layer_inputs(plan, used, layer)
    weights = [expert[weight] for expert in plan.experts]
    merged = dict(merge_tensors(plan))
    wanted = least_squares(inputs, weights)
    torch.testing.assert_close(merged[weight].double(), wanted, rtol=1e-4, atol=1e-4)
    mean = torch.stack(weights).double().mean(0)
    assert float((wanted - mean).norm() / mean.norm()) > 0.01  # and no average
    for bare in (n for n in plan.tasks if "norm" in n.lower() or "embed" in n or "bias" in n):
        expected = torch.stack([expert[bare] for expert in plan.experts]).mean(0)
        torch.testing.assert_close(merged[bare], expected)
    (warning,) = plan.warnings
    assert f"tensors are guided by {file}" in warning


def test_convolutions_are_least_squares_on_their_patches(tmp_path: Path) -> None:
    used = data("cnn", owners=(1, 0, 1, 0))
    models = checkpoints(tmp_path / "models", cnn)
    file = tmp_path / "c.safetensors"
    write_calibration(file, calibrate(make_plan(make_recipe(models)), used))
    plan = planned(models, file, {"name": "regmean", "alpha": 1.0})
    for layer, padding in [("stem", 0), ("blocks.1.conv2", 1)]:
        patches = [
            nn.functional.unfold(x, 3, padding=padding).movedim(1, 2).flatten(0, 1)
            for x in layer_inputs(plan, used, layer)
        ]
        weights = [expert[f"{layer}.weight"].flatten(1) for expert in plan.experts]
        merged = dict(merge_tensors(plan, [f"{layer}.weight"]))[f"{layer}.weight"]
        torch.testing.assert_close(
            merged.flatten(1).double(), least_squares(patches, weights), rtol=1e-4, atol=1e-4
        )
    # LOT also takes the scale of a BatchNorm by what it normalised
    plan = planned(models, file, {"name": "lot", "scale": 1.0})
    assert "blocks.0.bn1.weight" in plan.guidance.maps  # pyright: ignore
    norms = layer_inputs(plan, used, "blocks.0.bn1")
    parts = []
    for x, expert in zip(norms, plan.experts, strict=True):
        mean, var = (expert[f"blocks.0.bn1.running_{n}"][:, None, None] for n in ("mean", "var"))
        parts.append(((x - mean) / (var + 1e-5).sqrt()).square().mean((0, 2, 3)).double())
    scales = [expert["blocks.0.bn1.weight"].double() for expert in plan.experts]
    wanted = (parts[0] * scales[0] + parts[1] * scales[1]) / (parts[0] + parts[1])
    merged = dict(merge_tensors(plan, ["blocks.0.bn1.weight"]))["blocks.0.bn1.weight"]
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-4, atol=1e-5)


def test_transposed_layers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def gpt2() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=9
        )
        return transformers.GPT2Model(config).eval()

    torch.manual_seed(0)
    masks = [torch.tensor([[1] * 7, [1] * 5 + [0] * 2]) for _ in range(4)]
    cut = tuple(
        {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": mask} for mask in masks
    )
    used = Data(gpt2, cut, 8, gram=True, owners=(0, 0, 1, 1))
    models = checkpoints(tmp_path / "models", gpt2)
    file = tmp_path / "c.safetensors"
    write_calibration(file, calibrate(make_plan(make_recipe(models)), used))
    plan = planned(models, file, {"name": "regmean", "alpha": 1.0})
    layer = "h.1.attn.c_proj"  # square: nothing but the calibration tells how it is stored
    merged = dict(merge_tensors(plan, [f"{layer}.weight"]))[f"{layer}.weight"]
    inputs = layer_inputs(plan, used, layer)
    wanted = least_squares(inputs, [expert[f"{layer}.weight"].T for expert in plan.experts]).T
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-4, atol=1e-4)


def test_shards_without_an_expert_s_batch_join_to_the_whole(tmp_path: Path) -> None:
    used = data("cnn", owners=(0, 1, 0, 1))
    models = checkpoints(tmp_path / "models", cnn)
    plan = make_plan(make_recipe(models))
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        write_calibration(file, calibrate(plan, used, shard=(number, 2)))
    whole, joined = calibrate(plan, used), join_calibrations(files)
    assert joined.states.keys() == whole.states.keys() and joined.head == whole.head
    for key in (key for key in whole.states if key.startswith("gram/")):
        torch.testing.assert_close(joined.states[key]["gram"], whole.states[key]["gram"])
    assert not any("expert 2" in key for key in calibrate(plan, used, shard=(0, 2)).states)
    # a merge by a shard alone: where one expert saw nothing the other is followed
    alone = planned(models, files[0], {"name": "regmean", "alpha": 1.0})
    merged = dict(merge_tensors(alone, ["blocks.0.conv1.weight"]))["blocks.0.conv1.weight"]
    torch.testing.assert_close(merged, alone.experts[0]["blocks.0.conv1.weight"])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    models = checkpoints(tmp_path / "models", cnn)
    plan = make_plan(make_recipe(models))
    for owners in [(0, 1), (0, 1, 2, 0)]:
        with pytest.raises(DataError, match="name one from 0 on for each batch"):
            calibrate(plan, data("cnn", owners=owners))
    used = data("cnn")
    file = tmp_path / "c.safetensors"
    write_calibration(file, calibrate(plan, Data(cnn, used.batches, 24)))
    with pytest.raises(PlanError, match=r"holds no Gram matrices \(`calibrate --gram`\)"):
        planned(models, file, {"name": "regmean"})
    with pytest.raises(PlanError, match="is guided by a calibration"):
        make_plan(make_recipe({**models, "method": {"name": "lot"}}))


def test_fisher_is_of_each_expert_s_own_inputs_and_reaches_the_merge(tmp_path: Path) -> None:
    torch.manual_seed(1)
    cut = tuple(ARCHITECTURES["cnn"][1](3) for _ in range(4))
    used = Data(cnn, cut, 12, owners=(0, 1, 0, 1), fisher="classes")
    models = checkpoints(tmp_path / "models", cnn)
    plan = make_plan(make_recipe(models))
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        write_calibration(file, calibrate(plan, used, shard=(number, 2)))
    whole = calibrate(plan, used)
    joined = join_calibrations(files)
    assert joined.states.keys() == whole.states.keys() and joined.head == whole.head
    file = tmp_path / "c.safetensors"
    write_calibration(file, joined)
    weight = "blocks.0.conv1.weight"
    squares = []
    for number, checkpoint in enumerate(plan.experts):
        module = cnn()
        module.load_state_dict({n: checkpoint[n] for n in checkpoint})
        own = [b for b in range(4) if used.owners[b] == number]
        parts = [squared_gradients(module, cut[b], "classes", first=3 * b)[weight] for b in own]
        squares.append(torch.stack(parts).sum(0).double() / 6)
    merged = planned(models, file, {"name": "fisher", "floor": 0.0})
    assert merged.tasks[weight].calibration == ("fisher",)
    assert merged.tasks["norm.running_mean"].calibration == ()
    experts = [expert[weight].double() for expert in plan.experts]
    wanted = (squares[0] * experts[0] + squares[1] * experts[1]) / (squares[0] + squares[1])
    for block in (1 << 17, 80):  # rows are read apart
        found = dict(merge_tensors(merged, [weight], block=block))[weight]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    known = merged.guidance
    assert known is not None
    values = known.values(weight, ["fisher"], 2, 5)
    assert values["fisher"].shape == (2, 3, 8, 3, 3) and values["fisher_base"].shape[0] == 3
    assert values["fisher_samples"].tolist() == [12, 6, 6]
    ubgm = planned(models, file, {"name": "ubgm"})
    assert not torch.equal(dict(merge_tensors(ubgm, [weight]))[weight], found)


@pytest.mark.parametrize("name", ["bert", "cnn"])
def test_forward_each_layer_sees_what_merged_layers_give(name: str, tmp_path: Path) -> None:
    used = data(name, owners=(0, 1, 1, 0))
    models = checkpoints(tmp_path / "models", used.factory)
    plan = make_plan(make_recipe(models))
    method = RegMeanPlusPlus(alpha=1.0)
    file = tmp_path / "c.safetensors"
    write_calibration(file, calibrate_forward(plan, used, method))
    merging = planned(models, file, {"name": "regmean_plus_plus", "alpha": 1.0})
    merged = dict(merge_tensors(merging))
    # the merged model's own blocks, from the file's merge, give what each expert's block is given
    whole = used.factory()
    whole.load_state_dict(merged, strict=False)
    block, layer = {
        "bert": ("encoder.layer.2", "output.dense"),
        "cnn": ("blocks.2", "conv2"),
    }[name]
    inputs: list[Tensor] = []
    for number, checkpoint in enumerate(plan.experts):
        module = used.factory()
        module.load_state_dict({n: checkpoint[n] for n in checkpoint}, strict=False)
        part, seen = module.get_submodule(block), []
        part.get_submodule(layer).register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0])
        )
        for owner, batch in zip(used.owners, used.batches, strict=True):
            if owner != number:
                continue
            with evaluating([whole, module]):
                handle = whole.get_submodule(block).register_forward_pre_hook(
                    lambda _m, args, kwargs, part=part: void(part(*args, **kwargs)),
                    with_kwargs=True,
                )
                call(whole, batch)
                handle.remove()
            if not isinstance(batch, Tensor):
                seen[-1] = seen[-1][batch["attention_mask"].bool()]
            else:
                unfolded = nn.functional.unfold(seen[-1], 3, padding=1)
                seen[-1] = unfolded.movedim(1, 2).flatten(0, 1)
        inputs.append(torch.cat(seen))
    weight = f"{block}.{layer}.weight"
    wanted = least_squares(inputs, [expert[weight].flatten(1) for expert in plan.experts])
    found = merged[weight].flatten(1).double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    # and not what the experts' own paths give
    own = calibrate(plan, used).value("gram", f"{block}.{layer}/expert 1")["gram"]
    other = calibrate_forward(plan, used, method).value("gram", f"{block}.{layer}/expert 1")["gram"]
    assert float((own - other).norm() / own.norm()) > 0.01
    assert "layers before were merged by regmean_plus_plus" in merging.warnings[0]


def void(_: object) -> None:
    """Take what a hook is not to return."""


def test_equal_experts_and_the_first_layer_are_regmean_s(tmp_path: Path) -> None:
    used = data("cnn", owners=(0, 1, 1, 0))
    models = checkpoints(tmp_path / "models", cnn)
    plan = make_plan(make_recipe(models))
    forward, own = calibrate_forward(plan, used, RegMeanPlusPlus()), calibrate(plan, used)
    torch.testing.assert_close(
        forward.value("gram", "stem/expert 2"), own.value("gram", "stem/expert 2")
    )
    assert forward.head.grams == own.head.grams
    file = tmp_path / "own.safetensors"
    write_calibration(file, own)
    with pytest.raises(PlanError, match="holds no Gram matrices of a forward pass"):
        planned(models, file, {"name": "regmean_plus_plus"})
    same = {**models, "experts": [models["experts"][0]] * 2}
    plan = make_plan(make_recipe(same))
    forward, own = calibrate_forward(plan, used, RegMeanPlusPlus()), calibrate(plan, used)
    for key in (key for key in own.states if key.startswith("gram/")):
        torch.testing.assert_close(forward.states[key]["gram"], own.states[key]["gram"])
