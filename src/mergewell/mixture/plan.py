"""The plan of a mixture: where each of its tensors comes from. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergewell.errors import PlanError
from mergewell.mixture.choice import Mixture
from mergewell.mixture.forms import FORMS, PROJECTIONS, RESIDUAL, Form
from mergewell.opening import open_model
from mergewell.storage.base import Checkpoint
from mergewell.storage.layer_stack import LayerNames, find_layers
from mergewell.storage.spec import TensorSpec

PIECE = 1 << 24
"""Elements that are copied at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the mixture that stands in one of its models."""

    spec: TensorSpec
    """The tensor as it will be written."""

    model: Checkpoint
    name: str
    """What it is called there."""

    noise: float = 0.0
    scale: float = 1.0

    @property
    def treatment(self) -> str:
        """What happens to it, in a word."""
        return "copy" if not self.noise and self.scale == 1 else "noise and scale"


@dataclass(frozen=True, slots=True)
class MixturePlan:
    """A mixture with its opened models and all tensors that it will have."""

    mixture: Mixture
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    """Those of the routed experts, then of the shared ones."""

    form: Form
    layers: LayerNames
    parts: tuple[Part, ...]
    gates: tuple[TensorSpec, ...]
    """A gate a layer, [experts, width]; then, of shared experts, their own, [1, width]."""

    width: int

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors that are written."""
        return (*(part.spec for part in self.parts), *self.gates)

    @property
    def write_bytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors to read; gates made of hidden states read the base once more."""
        read = sum(part.model.spec(part.name).nbytes for part in self.parts)
        hidden = self.mixture.gate in ("hidden", "hidden_avg")
        return read + hidden * sum(spec.nbytes for spec in self.base.specs.values())

    @property
    def peak_bytes(self) -> int:
        """Memory that writing needs: a few pieces; gates made of hidden states take the base."""
        hidden = self.mixture.gate in ("hidden", "hidden_avg")
        held = 4 * sum(spec.numel for spec in self.base.specs.values()) if hidden else 0
        return held + 4 * 4 * PIECE

    def as_data(self) -> dict[str, Any]:
        """Return the plan as plain data, as `mergewell plan --json` gives it."""
        rows = [
            (part.spec, part.treatment, {"model": str(part.model.path), "tensor": part.name})
            for part in self.parts
        ]
        rows += [(spec, "gate", None) for spec in self.gates]
        return {
            "version": 1,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_bytes": self.peak_bytes,
            "passes": 1,
            "tensors": [
                {
                    "name": spec.name,
                    "method": treatment,
                    "shape": list(spec.shape),
                    "dtype": str(spec.dtype).removeprefix("torch."),
                    "from": origin,
                }
                for spec, treatment, origin in rows
            ],
            "mixture": self.mixture.model_dump(mode="json"),
            "warnings": [],
        }


def plan_mixture(mixture: Mixture) -> MixturePlan:
    """Return the plan of a mixture.

    Raises:
        PlanError: models of other architectures or shapes, biases that a mixture has no place for,
            or shared experts that it has none for, or wants.
        CheckpointError: models that cannot be read.
    """
    base = open_model(mixture.base, ())
    experts = tuple(open_model(each.path, (), base=base) for each in mixture.all_experts)
    form = _form(base, experts)
    if len(mixture.shared_experts) != form.shared:
        wanted = "one" if form.shared else "none"
        raise PlanError(
            f"shared_experts: {form.architecture}, the mixture of such models as {base.path}, has "
            f"{wanted}, but {len(mixture.shared_experts)} are given; "
            f"{'name one' if form.shared else 'remove the key'}."
        )
    layers = find_layers([*base], where=str(base.path))
    parts = tuple(_parts(mixture, base, experts, form, layers))
    first = base.spec(layers.join(0, "mlp.gate_proj.weight"))
    dtype = _dtype(mixture, first)
    width = first.shape[1]
    gates = [
        TensorSpec(
            layers.join(i, f"{form.block}.gate.weight"), dtype, (len(mixture.experts), width)
        )
        for i in range(layers.count)
    ]
    gates += [
        TensorSpec(layers.join(i, f"{form.block}.shared_expert_gate.weight"), dtype, (1, width))
        for i in range(layers.count)
        if form.shared
    ]
    return MixturePlan(mixture, base, experts, form, layers, parts, tuple(gates), width)


def _form(base: Checkpoint, experts: Sequence[Checkpoint]) -> Form:
    kind = "" if base.config is None else str(base.config.get("model_type"))
    if kind not in FORMS:
        raise PlanError(
            f"{base.path} is of the architecture {kind!r}, of which no mixture is known here; give "
            f"models of {', '.join(FORMS)}."
        )
    for expert in experts:
        theirs = None if expert.config is None else expert.config.get("model_type", kind)
        if theirs not in (None, kind):
            raise PlanError(
                f"{expert.path} is of the architecture {theirs!r}, but {base.path} of {kind!r}; a "
                "mixture needs models of one."
            )
    return FORMS[kind]


def _parts(
    mixture: Mixture,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    form: Form,
    layers: LayerNames,
) -> Iterator[Part]:
    for name in base:
        spec = base.spec(name)
        dtype = _dtype(mixture, spec)
        layer, rest = layers.split(name) or (0, "")
        if not rest.startswith("mlp."):
            yield Part(TensorSpec(name, dtype, spec.shape), base, name)
            continue
        projection, _, kind = rest.removeprefix("mlp.").partition(".")
        if kind != "weight" or projection not in form.names:
            raise PlanError(
                f"{base.path}: {name} has no place in {form.architecture}; give models whose "
                f"feed-forward layers are {', '.join(PROJECTIONS)} without biases."
            )
        for number, (expert, choice) in enumerate(zip(experts, mixture.all_experts, strict=True)):
            if name not in expert or expert.spec(name).shape != spec.shape:
                raise PlanError(
                    f"{expert.path}: {name} is missing or of another shape than in {base.path}; "
                    "give models of one size."
                )
            own = f"{form.home(number, mixture)}.{form.names[projection]}.weight"
            yield Part(
                TensorSpec(layers.join(layer, own), dtype, spec.shape),
                expert,
                name,
                noise=choice.noise,
                scale=choice.scale if projection == RESIDUAL else 1.0,
            )


def _dtype(mixture: Mixture, spec: TensorSpec) -> torch.dtype:
    if mixture.dtype is None or not spec.dtype.is_floating_point:
        return spec.dtype
    return getattr(torch, mixture.dtype)
