"""Make the vision assets of `mergewell demo`: heads, four experts, test and calibration images.

    OUT=src/mergewell/demo/assets/vision
    python benchmarks/experts/train_vision.py --data /work/shared/data/vision_data --out $OUT

`--data` holds `TASK.npz` (grey: x_train, y_train, x_test, y_test; colour: jpeg_*, off_*, y_*).
Everything is seeded. A finished expert is not trained again (delete its file to do so); `--only
TASK ...` in several processes, `--threads 1` each, shares the work, a last call without `--only`
judges. The held-out part of the training set (`HELD_OUT`) is never trained on: merge coefficients
are chosen there and written to `validation.json`. `--judge-test` adds `test.json`.
What was tried and why these settings: `docs/studies/demo_experts.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo import vision
from mergewell.demo.training import fine_tune

SEED = 0
HELD_OUT = {"sign_digits": 300}  # training images kept for choices; 500 where not named
SHOTS = 30  # training images a class behind a head
SHRINKAGE = 3.0
FIRST_BLOCK = 5  # stem and blocks before it stay the base's
STEPS = 100
BATCH = 32
LEARNING_RATE = 1e-4
WARMUP = 20
TEST_IMAGES = 500
DENSITY = 0.2
AVERAGE = 0.25
JUDGED = 300  # held-out images a task behind validation.json
SUM_COEFFICIENTS = (0.25, 0.4, 0.5, 0.6, 0.8)
TIES_COEFFICIENTS = (1.0, 1.25, 1.5, 2.0)

Weights = dict[str, Tensor]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Raw:
    """One split of one data set in a fixed random order; images decoded on demand."""

    def __init__(self, folder: Path, task: str, split: str) -> None:
        with np.load(folder / f"{task}.npz") as archive:
            arrays = {key: archive[key] for key in archive.files if key.endswith(split)}
        self.labels = torch.from_numpy(arrays[f"y_{split}"].astype(np.int64))
        self.order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(SEED))
        self.labels = self.labels[self.order]
        self.grey = f"x_{split}" in arrays
        if self.grey:
            self.pixels = torch.from_numpy(arrays[f"x_{split}"])[self.order]
        else:
            data, offsets = arrays[f"jpeg_{split}"].tobytes(), arrays[f"off_{split}"]
            self.jpegs = [data[offsets[i] : offsets[i + 1]] for i in self.order.tolist()]

    def stored(self, indices: Tensor) -> Weights:
        """The images as they are packaged (see `mergewell.demo.vision`)."""
        labels = self.labels[indices].to(torch.uint8)
        if self.grey:
            return {"images": self.pixels[indices].contiguous(), "labels": labels}
        parts = [self.jpegs[i] for i in indices.tolist()]
        offsets = torch.tensor([0, *np.cumsum([len(part) for part in parts]).tolist()])
        jpeg = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        return {"jpeg": jpeg, "offsets": offsets, "labels": labels}

    def images(self, indices: Tensor) -> Tensor:
        """Model input [N, 3, 64, 64]."""
        stored = self.stored(indices)
        if self.grey:
            return vision.prepare(stored["images"].unsqueeze(1).expand(-1, 3, -1, -1))
        return vision.prepare(vision.decode(stored["jpeg"], stored["offsets"]))


def split_held_out(raw: Raw, task: str) -> tuple[Tensor, Tensor]:
    """(training indices, held-out indices)."""
    count = HELD_OUT.get(task, 500)
    return torch.arange(count, len(raw.labels)), torch.arange(count)


def first_of_each_class(labels: Tensor, indices: Tensor, count: int) -> Tensor:
    """The first `count` indices of every class, class by class."""
    classes = range(int(labels.max()) + 1)
    return torch.cat([indices[labels[indices] == c][:count] for c in classes])


@torch.inference_mode()
def features(module: nn.Module, images: Tensor) -> Tensor:
    """Unit features [N, 1280]."""
    parts = [module(part) for part in images.split(50)]
    return functional.normalize(torch.cat(parts), dim=-1)


def make_head(unit: Tensor, labels: Tensor) -> Tensor:
    """Whitened class prototypes [C, 1280] with unit rows from base features [N, 1280].

    Linear discriminant directions: class means minus the mean, times the inverse of the shrunk
    within-class covariance, made orthogonal to the mean feature so that no bias is needed.
    """
    means = torch.stack([unit[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    residual = unit - means[labels]
    covariance = residual.T @ residual / len(unit)
    ridge = SHRINKAGE * 10.0 * covariance.diagonal().mean()
    covariance = covariance + ridge * torch.eye(len(covariance))
    rows = torch.linalg.solve(covariance, (means - means.mean(0)).T).T
    centre = functional.normalize(means.mean(0), dim=0)
    return functional.normalize(rows - (rows @ centre)[:, None] * centre, dim=-1)


def trained_names(module: nn.Module) -> list[str]:
    """Names of the parameters an expert may change."""
    frozen = ("_conv_stem.", "_bn0.", *(f"_blocks.{i}." for i in range(FIRST_BLOCK)))
    return [name for name, _ in module.named_parameters() if not name.startswith(frozen)]


def train(module: nn.Module, base: Weights, raw: Raw, indices: Tensor, head: Tensor) -> Weights:
    """Fine-tune from the base; returns the task vector."""
    module.load_state_dict(base)
    names = set(trained_names(module))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    generator = torch.Generator().manual_seed(SEED)
    epochs = STEPS * BATCH // len(indices) + 1
    order = torch.cat([torch.randperm(len(indices), generator=generator) for _ in range(epochs)])
    started = time.perf_counter()

    def loss_of_step(network: nn.Module, step: int) -> Tensor:
        batch = indices[order[step * BATCH : (step + 1) * BATCH]]
        images = raw.images(batch).contiguous(memory_format=torch.channels_last)
        return functional.cross_entropy(vision.logits(network(images), head), raw.labels[batch])

    def on_step(step: int, loss: float) -> None:
        if step % 20 == 19:
            seconds = time.perf_counter() - started
            say(f"  step {step + 1}/{STEPS} loss {loss:.3f} {seconds:.0f} s")

    fine_tune(
        module,
        loss_of_step,
        parameters=module.parameters(),
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP,
        clip=1.0,
        seed=SEED,
        on_step=on_step,
    )
    return {n: p.detach() - base[n] for n, p in module.named_parameters() if n in names}


def to_int8(task_vector: Weights) -> Weights:
    """Matrices and convolutions as int8 with a float scale a row, the rest as float16."""
    stored: Weights = {}
    for name, delta in task_vector.items():
        if delta.dim() < 2:
            stored[f"{name}.d"] = delta.half()
            continue
        scale = delta.flatten(1).abs().amax(1).clamp(min=1e-12) / 127.0
        codes = (delta.flatten(1) / scale[:, None]).round().to(torch.int8)
        stored[f"{name}.q"] = codes.view(delta.shape).contiguous()
        stored[f"{name}.s"] = scale
    return stored


def from_int8(stored: Mapping[str, Tensor]) -> Weights:
    """The task vector in float32."""
    found = {key[:-2]: tensor.float() for key, tensor in stored.items() if key.endswith(".d")}
    for key, codes in stored.items():
        if key.endswith(".q"):
            rows = codes.flatten(1).float() * stored[f"{key[:-2]}.s"][:, None]
            found[key[:-2]] = rows.view(codes.shape)
    return found


def ties(experts: list[Weights], density: float) -> Weights:
    """TIES with one threshold a model, election by mass, disjoint mean (plain reference form)."""
    names = sorted(experts[0])
    flat = torch.stack([torch.cat([e[name].flatten() for name in names]) for e in experts])
    rank = flat.shape[1] - int(density * flat.shape[1])
    limit = flat.abs().kthvalue(rank, dim=1, keepdim=True).values
    flat = torch.where(flat.abs() > limit, flat, 0.0)
    agree = (flat.sign() == flat.sum(0).sign()) & (flat != 0)
    merged = (flat * agree).sum(0) / agree.sum(0).clamp(min=1)
    sizes = [experts[0][name].numel() for name in names]
    parts = zip(names, merged.split(sizes), strict=True)
    return {name: part.view(experts[0][name].shape) for name, part in parts}


class Judge:
    """Accuracy (percent) of models on one set of images a task."""

    def __init__(
        self,
        module: nn.Module,
        base: Weights,
        heads: Weights,
        data: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.module, self.base, self.heads, self.data = module, base, heads, data

    def outputs(self, direction: Weights, scale: float) -> dict[str, Tensor]:
        """Probabilities a task of base + scale * direction."""
        weights = {
            n: w + scale * direction[n] if n in direction else w for n, w in self.base.items()
        }
        self.module.load_state_dict(weights)
        return {
            task: vision.logits(features(self.module, images), self.heads[task]).softmax(-1)
            for task, (images, _) in self.data.items()
        }

    def accuracy(self, outputs: Mapping[str, Tensor]) -> dict[str, float]:
        """{task: percent}."""
        return {
            task: 100.0 * float((outputs[task].argmax(-1) == labels).float().mean())
            for task, (_, labels) in self.data.items()
        }

    def table(
        self, experts: Mapping[str, Weights], sums: tuple[float, ...], scales: tuple[float, ...]
    ) -> dict[str, dict[str, float]]:
        """Rows of accuracies with `mean` and `retention`."""
        rows = {"base": self.accuracy(self.outputs({}, 0.0))}
        own = {task: self.outputs(experts[task], 1.0) for task in vision.TASKS}
        rows["expert"] = {task: self.accuracy(own[task])[task] for task in vision.TASKS}
        mean = {t: torch.stack([own[e][t] for e in own]).mean(0) for t in vision.TASKS}
        rows["ensemble (probabilities)"] = self.accuracy(mean)
        total = {n: sum_of([e[n] for e in experts.values()]) for n in experts[vision.TASKS[0]]}
        for scale in sums:
            name = "average" if scale == AVERAGE else f"task_arithmetic {scale}"
            rows[name] = self.accuracy(self.outputs(total, scale))
        elected = ties(list(experts.values()), DENSITY)
        for scale in scales:
            rows[f"ties {scale}"] = self.accuracy(self.outputs(elected, scale))
        for row in rows.values():
            ratios = [row[task] / rows["expert"][task] for task in vision.TASKS]
            row["mean"] = sum(row[task] for task in vision.TASKS) / len(vision.TASKS)
            row["retention"] = 100.0 * sum(ratios) / len(ratios)
        for name, row in rows.items():
            say(f"  {name:26s} " + " ".join(f"{key} {value:.1f}" for key, value in row.items()))
        return rows


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def best(rows: Mapping[str, Mapping[str, float]], method: str) -> float:
    """The coefficient of `method` with the best mean."""
    found = {float(n.split()[1]): row["mean"] for n, row in rows.items() if n.startswith(method)}
    return max(found, key=lambda scale: found[scale])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the vision assets of the demo.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--judge-test", action="store_true")
    parser.add_argument("--only", nargs="+", choices=vision.TASKS, help="train these, then stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    module = vision.efficientnet_lite0().to(memory_format=torch.channels_last)
    loaded = torch.load(vision.base_checkpoint_path(), weights_only=True)
    base = {name: loaded[name].clone() for name in module.state_dict()}
    module.load_state_dict(base)
    raws = {task: Raw(options.data, task, "train") for task in vision.TASKS}
    parts = {task: split_held_out(raws[task], task) for task in vision.TASKS}

    heads: Weights = {}
    calibration: list[Tensor] = []
    for task in vision.TASKS:
        raw, (training, _) = raws[task], parts[task]
        chosen = first_of_each_class(raw.labels, training, SHOTS)
        heads[task] = make_head(features(module, raw.images(chosen)), raw.labels[chosen])
        rest = training[~torch.isin(training, chosen)]
        calibration.append(raw.images(rest[: vision.CALIBRATION_PER_TASK]).half())
    save_file(heads, out / "heads.safetensors")
    save_file({"images": torch.cat(calibration).contiguous()}, out / "calibration.safetensors")

    for task in vision.TASKS:
        test = Raw(options.data, task, "test")
        each = TEST_IMAGES // (int(test.labels.max()) + 1)
        chosen = first_of_each_class(test.labels, torch.arange(len(test.labels)), each)
        save_file(test.stored(chosen), out / f"{task}.test.safetensors")

    for task in options.only or vision.TASKS:
        path = out / f"{task}.task_vector.safetensors"
        if path.exists():
            say(f"{task}: {path.name} is there")
            continue
        say(f"{task}: training")
        task_vector = train(module, base, raws[task], parts[task][0], heads[task])
        settings = {
            "steps": STEPS,
            "batch": BATCH,
            "optimizer": "AdamW",
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.0,
            "warmup_steps": WARMUP,
            "schedule": "linear",
            "clip": 1.0,
            "trained": f"_blocks.{FIRST_BLOCK} and later, _conv_head, _bn1",
            "size": vision.SIZE,
        }
        metadata = {
            "format": "mergewell.task_vector.v1",
            "task": task,
            "base": f"{vision.BASE_PACKAGE}=={vision.BASE_VERSION}",
            "seed": str(SEED),
            "training": json.dumps(settings),
        }
        partial = path.with_suffix(".partial")
        save_file(to_int8(task_vector), partial, metadata=metadata)
        partial.rename(path)

    if options.only:
        return
    experts = {t: from_int8(load_file(out / f"{t}.task_vector.safetensors")) for t in vision.TASKS}
    say("held-out training images")
    held = {
        task: (
            raws[task].images(parts[task][1][:JUDGED]),
            raws[task].labels[parts[task][1][:JUDGED]],
        )
        for task in vision.TASKS
    }
    rows = Judge(module, base, heads, held).table(experts, SUM_COEFFICIENTS, TIES_COEFFICIENTS)
    chosen_scales = {"task_arithmetic": best(rows, "task_arithmetic"), "ties": best(rows, "ties")}
    result = {"version": 1, "chosen": chosen_scales, "density": DENSITY, "accuracy": rows}
    (out / "validation.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.judge_test:
        say(f"test images, at {chosen_scales}")
        shipped = {task: vision.load_images(task) for task in vision.TASKS}
        rows = Judge(module, base, heads, shipped).table(
            experts, (AVERAGE, chosen_scales["task_arithmetic"]), (chosen_scales["ties"],)
        )
        result = {"version": 1, "chosen": chosen_scales, "density": DENSITY, "accuracy": rows}
        (out / "test.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
