"""Writing a mixture: feed-forward layers of all experts, the base's rest, and gates."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergewell.errors import PlanError
from mergewell.mixture.choice import Mixture
from mergewell.mixture.gates import make_gates
from mergewell.opening import open_model
from mergewell.storage.base import Checkpoint
from mergewell.storage.layer_stack import find_layers
from mergewell.storage.layout import filled_layouts
from mergewell.storage.manifest import InputFile, Manifest, hash_file, versions
from mergewell.storage.spec import TensorSpec
from mergewell.storage.writer import CheckpointWriter, require_free_name

_PIECE = 1 << 24
"""Elements that are copied at a time."""
_SHARD_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class _Form:
    """How a mixture of models of one architecture is called."""

    architecture: str
    model_type: str
    block: str
    names: Mapping[str, str]

    def config(self, dense: Mapping[str, Any], mixture: Mixture) -> dict[str, Any]:
        """Return the mixture's config.json for the base's."""
        count = len(mixture.experts)
        return {
            **{key: value for key, value in dense.items() if key != "sliding_window"},
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "num_local_experts": count,
            "num_experts": count,
            "num_experts_per_tok": mixture.experts_per_token,
            "moe_intermediate_size": dense.get("intermediate_size"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            **({"sliding_window": None} if "sliding_window" in dense else {}),
            **({} if mixture.dtype is None else {"dtype": mixture.dtype}),
        }


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = _Form(
    "MixtralForCausalLM", "mixtral", "block_sparse_moe",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)  # fmt: skip
_QWEN3 = _Form("Qwen3MoeForCausalLM", "qwen3_moe", "mlp", {name: name for name in _PROJECTIONS})
_FORMS = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen3": _QWEN3}


def write_mixture(mixture: Mixture, out: str | Path) -> Manifest:
    """Write the mixture `out`, a folder that transformers loads, and return its manifest.

    Source: mergekit 0.1.4, `mergekit-moe`, by its documentation.
    Departures: experts that all are the same are not refused: they give the model itself.

    Raises:
        PlanError: models of other architectures or shapes, biases that a mixture has no place for,
            or prompts that tell nothing.
        CheckpointError, ModelError: models or tokenizers that cannot be read.
        OutputError: `out` exists or cannot be written.
    """
    began = time.perf_counter()
    require_free_name(Path(out).resolve())
    base = open_model(mixture.base, ())
    experts = [open_model(expert.path, (), base=base) for expert in mixture.experts]
    form = _form(base, experts)
    layers = find_layers([*base], where=str(base.path))
    sources = dict(_sources(base, experts, form, f"{layers.prefix}."))
    width = base.spec(f"{layers.prefix}.0.mlp.gate_proj.weight").shape[1]
    gates = make_gates(mixture, base, layers.count, width)
    dtype = base.spec(f"{layers.prefix}.0.mlp.gate_proj.weight").dtype
    dtype = dtype if mixture.dtype is None else getattr(torch, mixture.dtype)
    names = [f"{layers.prefix}.{i}.{form.block}.gate.weight" for i in range(layers.count)]
    specs = [
        TensorSpec(new, dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
        for new, (model, old) in sources.items()
        for spec in [model.spec(old)]
    ]
    specs += [TensorSpec(name, dtype, tuple(gates.shape[1:])) for name in names]
    files = dict.fromkeys(file for model in (base, *experts) for file in model.files)
    inputs = [
        InputFile(path=str(file), hash=hash_file(file), bytes=file.stat().st_size) for file in files
    ]
    assert base.config is not None  # `_form` looked at it
    config = form.config(base.config, mixture)
    key = f"mixture-{mixture.model_dump_json()}-{'-'.join(file.hash for file in inputs)}"
    files_out = filled_layouts(specs, _SHARD_BYTES)
    with CheckpointWriter(Path(out), files_out, metadata={"format": "pt"}, key=key) as writer:
        for new, (model, old) in sources.items():
            for start, part in _pieces(model, old):
                writer.write(new, start, part.to(dtype) if part.is_floating_point() else part)
        for name, gate in zip(names, gates, strict=True):
            writer.write(name, 0, gate.reshape(-1).to(dtype))
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
                "tensors": len(specs),
                "tensors_changed": len(names),
                "seed": mixture.seed,
                "versions": versions(),
                "directory": str(Path.cwd()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )


def _form(base: Checkpoint, experts: Sequence[Checkpoint]) -> _Form:
    kind = None if base.config is None else base.config.get("model_type")
    if kind not in _FORMS:
        raise PlanError(
            f"{base.path} is of the architecture {kind!r}, of which no mixture is known here; give "
            f"models of {', '.join(_FORMS)}."
        )
    for expert in experts:
        theirs = None if expert.config is None else expert.config.get("model_type", kind)
        if theirs not in (None, kind):
            raise PlanError(
                f"{expert.path} is of the architecture {theirs!r}, but {base.path} of {kind!r}; a "
                "mixture needs models of one."
            )
    return _FORMS[kind]


def _sources(
    base: Checkpoint, experts: Sequence[Checkpoint], form: _Form, prefix: str
) -> Iterator[tuple[str, tuple[Checkpoint, str]]]:
    """Yield the names of the mixture's tensors, with the model and the name they come from."""
    for name in base:
        before, _, rest = name.partition(".mlp.")
        if not name.startswith(prefix) or not rest:
            yield name, (base, name)
            continue
        projection, _, kind = rest.partition(".")
        if kind != "weight" or projection not in form.names:
            raise PlanError(
                f"{base.path}: {name} has no place in {form.architecture}; give models whose "
                f"feed-forward layers are {', '.join(_PROJECTIONS)} without biases."
            )
        for number, expert in enumerate(experts):
            if name not in expert or expert.spec(name).shape != base.spec(name).shape:
                raise PlanError(
                    f"{expert.path}: {name} is missing or of another shape than in {base.path}; "
                    "give models of one size."
                )
            own = form.names[projection]
            yield f"{before}.{form.block}.experts.{number}.{own}.weight", (expert, name)


def _pieces(model: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    count = model.spec(name).numel
    for start in range(0, count, _PIECE):
        yield start, model.read(name, start, min(start + _PIECE, count))
