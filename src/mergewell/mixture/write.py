"""Writing a mixture: feed-forward layers of all experts, the base's rest, and gates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mergewell.mixture.choice import Mixture
from mergewell.mixture.gates import make_gates
from mergewell.mixture.plan import PIECE, MixturePlan, Part, plan_mixture
from mergewell.storage.layout import filled_layouts
from mergewell.storage.manifest import Algorithm, InputFile, Manifest, input_file, versions
from mergewell.storage.writer import CheckpointWriter, require_free_name

_SHARD_BYTES = 5 << 30


def write_mixture(
    mixture: Mixture | MixturePlan,
    out: str | Path,
    *,
    algorithm: Algorithm = "xxh3-128",
    on_progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Write the mixture `out`, a folder that transformers loads, and return its manifest.

    `on_progress` is called with the bytes that were just written.

    Source: mergekit 0.1.4, `mergekit-moe`, by its documentation.
    Departures: experts that all are the same are not refused: they give the model itself.

    Raises:
        PlanError: as `plan_mixture`, or prompts that tell nothing.
        CheckpointError, ModelError: models or tokenizers that cannot be read.
        OutputError: `out` exists or cannot be written.
    """
    began = time.perf_counter()
    require_free_name(Path(out).resolve())
    plan = plan_mixture(mixture) if isinstance(mixture, Mixture) else mixture
    mixture, base = plan.mixture, plan.base
    gates = make_gates(mixture, base, plan.layers.count, plan.width)
    routed = len(mixture.experts)
    stored = [layer[:routed] for layer in gates.unbind()]
    stored += [layer[routed:] for layer in gates.unbind()] if plan.form.shared else []
    inputs = _inputs(plan, algorithm)
    assert base.config is not None  # the plan looked at it
    config = plan.form.config(base.config, mixture)
    key = f"mixture-{mixture.model_dump_json()}-{'-'.join(file.hash for file in inputs)}"
    layouts = filled_layouts(plan.specs, _SHARD_BYTES)
    with CheckpointWriter(
        Path(out), layouts, metadata={"format": "pt"}, key=key, algorithm=algorithm
    ) as writer:

        def write(name: str, start: int, part: Tensor) -> None:
            writer.write(name, start, part)
            if on_progress is not None:
                on_progress(part.nbytes)

        for number, part in enumerate(plan.parts):
            for start, piece in _pieces(part, mixture.seed + 1 + number):
                write(part.spec.name, start, piece.to(part.spec.dtype))
        for spec, gate in zip(plan.gates, stored, strict=True):
            write(spec.name, 0, gate.reshape(-1).to(spec.dtype))
        for file in base.side_files:
            content = base.side_file(file)
            if file.name == "config.json":
                content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            writer.add_file(file.name, content)
        return writer.commit(
            {
                "recipe": {},
                "mixture": mixture.model_dump(mode="json"),
                "inputs": inputs,
                "tensors": len(plan.specs),
                "tensors_changed": len(plan.gates) + _changed(plan),
                "seed": mixture.seed,
                "versions": versions(),
                "directory": str(Path.cwd()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )


def _inputs(plan: MixturePlan, algorithm: Algorithm) -> list[InputFile]:
    files = dict.fromkeys(file for model in (plan.base, *plan.experts) for file in model.files)
    return [input_file(file, algorithm) for file in files]


def _changed(plan: MixturePlan) -> int:
    return sum(part.treatment != "copy" for part in plan.parts)


def _pieces(part: Part, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield pieces of a tensor, one after another, with the noise of its seed and scaled."""
    count = part.spec.numel
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, PIECE):
        piece = part.model.read(part.name, start, min(start + PIECE, count))
        if part.treatment != "copy":
            noise = torch.randn(piece.shape, generator=generator)
            piece = (piece.float() + part.noise * noise) * part.scale
        yield start, piece
