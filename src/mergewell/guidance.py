"""Guidance: what a calibration says of single tensors, for methods that ask for it.

A calibration (`mergewell.calibration`) holds states by unit, and its header says in which rows of
which parameters the nodes of a unit stand. Here a unit's values are laid on those rows. Of linear
maps it may hold the Gram matrices of what they were given.

Shapes: R rows of a tensor, O nodes of a unit; K experts, G groups of inputs, I inputs of a group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergewell.errors import CheckpointError, DataError, PlanError
from mergewell.guidance_states import Map, fisher_values, gram_values
from mergewell.methods.ops import rank_shares
from mergewell.statistics.m_loss import MLoss
from mergewell.storage.base import Checkpoint
from mergewell.storage.manifest import hash_file, new_hasher
from mergewell.storage.weight_file import SafetensorsFile
from mergewell.tensor_group import Value

FAMILIES: Mapping[str, str] = {
    "m_loss": "M-Loss",
    "gram": "Gram matrices (`calibrate --gram`)",
    "gram_forward": "Gram matrices of a forward pass (`calibrate --method regmean_plus_plus`)",
    "fisher": "Fisher information (`calibrate --fisher classes`)",
}
"""What methods may ask for, and what that is."""

_KEY, _VERSION = "mergewell.calibration", 1
_BASE_FISHER = re.compile(r"fisher/[^/]+/base/squares")
_ENDS = 64  # elements at either end of a tensor that tell a model


@dataclass(frozen=True, slots=True)
class Nodes:
    """Where the nodes of a unit stand in a tensor: node i in row start + i * step."""

    unit: str
    start: int
    step: int
    count: int

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.start, self.start + (self.count - 1) * self.step + 1, self.step)


@dataclass(frozen=True)
class Guidance:
    """An opened calibration and the tensors that it speaks of."""

    file: SafetensorsFile
    tensors: Mapping[str, tuple[Nodes, ...]]
    """By tensor name, which rows belong to which unit's nodes; all rows of the tensor do."""

    sizes: Mapping[str, int]
    """Rows of each of these tensors."""

    left_out: Mapping[str, str]
    """Tensors of measured units that cannot be guided, with the reason."""

    maps: Mapping[str, Map] = field(default_factory=dict[str, Map])
    """Weights of linear maps whose inputs' Gram matrices are known, by tensor name."""

    gradients: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the calibration calls tensors whose Fisher information is known, by tensor name."""

    experts: int = 0
    forward: str = ""
    """By what the layers before were merged when Gram matrices were made, if they were."""

    partly: str = ""
    """What to say of a calibration that has not seen all of its data."""

    @cached_property
    def digest(self) -> str:
        """Hash of the whole file."""
        return hash_file(self.file.path)

    def guides(self, name: str, families: Sequence[str]) -> bool:
        """Return whether all that a method asks for is known of a tensor.

        Raises:
            PlanError: there is no such family, or the calibration holds nothing of it.
        """
        known: dict[str, Mapping[str, object]] = {"m_loss": self.tensors, "gram": self.maps}
        known |= {"gram_forward": self.maps if self.forward else {}, "fisher": self.gradients}
        for family in families:
            if family not in FAMILIES:
                raise PlanError(f"Nothing guides a merge by {family!r}; known: {[*FAMILIES]}.")
            if not known[family] and not (family == "m_loss" and self.left_out):
                raise PlanError(
                    f"The calibration {self.file.path} holds no {FAMILIES[family]}; calibrate "
                    "again with what gathers them."
                )
        return bool(families) and all(name in known[family] for family in families)

    def described(self, guided: Sequence[str], names: Sequence[str]) -> str:
        """Return what to say of the calibration in a plan that guides some of its tensors by it.

        Raises:
            PlanError: it guides none.
        """
        if not guided:
            raise PlanError(
                f"The calibration {self.file.path} guides no tensor; choose a method that asks for "
                "it, such as m_ties or regmean, for the layers that it measured, or leave it out."
            )
        reasons = [f"; {n} is not: {why}" for n, why in self.left_out.items() if n in names]
        return (
            f"{len(guided)} of {len(names)} tensors are guided by {self.file.path}{self.partly}, "
            f"the others are merged without it{''.join(reasons)}."
        )

    def values(
        self, name: str, families: Sequence[str], start: int = 0, stop: int | None = None
    ) -> dict[str, Tensor]:
        """Return what is known of a tensor, in float64; by row, of rows [start, stop).

        - `m_loss` [R]: node M-Loss of each row's node
        - `m_loss_rank` [R]: its place among the tensor's rows, from 0, the smallest, to 1; ties
          from the front
        - `m_loss_layer_rank` []: the place of the unit's relative M-Loss among all units
        - `gram` [K, G, I, I]: of each expert, the sum of h h^T over the inputs h of the map
        - `gram_rows` [K]: the number of these inputs
        - `gram_along` []: the tensor's dimension that counts inputs, 1 or 0
        - `fisher` [K, R, ...]: of each expert, the mean squared gradient of its log-likelihood
        - `fisher_base` [R, ...]: the same of the base
        - `fisher_samples` [K + 1]: the number of samples, the base's first

        Raises:
            PlanError: there is no such family.
            CheckpointError: the states are missing, damaged, or of another number of nodes.
        """
        found: dict[str, Tensor] = {}
        for family in families:
            if family not in FAMILIES:
                raise PlanError(f"Nothing guides a merge by {family!r}; known: {[*FAMILIES]}.")
            if family == "m_loss":
                whole = self._m_loss.get(name, {})
                found |= {k: v[start:stop] if v.dim() else v for k, v in whole.items()}
            elif family != "fisher" and name in self.maps:
                found |= gram_values(self.file, self.maps[name], self.experts)
            elif family == "fisher" and name in self.gradients:
                rows = (start, stop)
                found |= fisher_values(self.file, self.gradients[name], self.experts, rows)
        return found

    @cached_property
    def _m_loss(self) -> Mapping[str, Value]:
        units = {part.unit: part.count for parts in self.tensors.values() for part in parts}
        values = {unit: self._unit(unit, nodes) for unit, nodes in units.items()}
        relative = torch.stack([value["relative"] for value in values.values()])
        layer_rank = dict(zip(units, rank_shares(relative), strict=True))
        found: dict[str, Value] = {}
        for name, parts in self.tensors.items():
            rows = torch.zeros(self.sizes[name], dtype=torch.float64)
            for part in parts:
                rows[part.rows] = values[part.unit]["node"]
            found[name] = {
                "m_loss": rows,
                "m_loss_rank": rank_shares(rows),
                "m_loss_layer_rank": torch.stack([layer_rank[p.unit] for p in parts]).mean(),
            }
        return found

    def _unit(self, unit: str, nodes: int) -> Value:
        prefix = f"m_loss/{unit}/"
        state = {
            name.removeprefix(prefix): self.file.read(name, 0, spec.numel).view(spec.shape)
            for name, spec in self.file.specs.items()
            if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
        }
        try:
            value = MLoss().value(state)
        except KeyError as error:
            raise CheckpointError(
                f"{self.file.path}: {prefix}{error.args[0]} is missing; calibrate again."
            ) from error
        if value["node"].shape != (nodes,) or not bool(value["node"].isfinite().all()):
            raise CheckpointError(
                f"{self.file.path}: the M-Loss of {unit} is not one finite number for each of its "
                f"{nodes} nodes; calibrate again."
            )
        return value


def open_guidance(path: str | Path, models: Sequence[Checkpoint]) -> Guidance:
    """Return the calibration in a file, fitted to the base and the experts; reads its header.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
        DataError: it is no calibration, or one of another version.
        PlanError: it is of other models, or does not fit their tensors.
    """
    file = SafetensorsFile(Path(path))
    if _KEY not in file.metadata:
        raise DataError(f"{path} is no calibration; give a file that `mergewell calibrate` wrote.")
    try:
        about: Any = json.loads(file.metadata[_KEY])
        if about["version"] != _VERSION:
            raise DataError(
                f"{path} is a calibration of version {about['version']} and this is mergewell for "
                f"version {_VERSION}; calibrate again."
            )
        known = [(str(model["name"]), str(model["digest"])) for model in about["models"]]
        places = [
            (_nodes(unit, branch["rows"]), str(branch["rows"]["parameter"]), branch["rows"]["dim"])
            for unit in about["units"]
            for branch in unit["branches"]
        ]
        grams = {str(place): int(along) for place, along in about.get("grams", {}).items()}
        forward = str(about.get("forward", ""))
        done, batches = len(about["done"]), int(about["batches"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the calibration's header cannot be read ({error!r}); calibrate again."
        ) from error
    _check_models(path, known, models)
    tensors: dict[str, list[Nodes]] = {}
    left_out: dict[str, str] = {}
    for nodes, parameter, dim in places:
        name = _found(path, parameter, models[0])
        tensors.setdefault(name, []).append(nodes)
        if dim != 0:
            left_out[name] = f"its nodes stand along dimension {dim}, not in rows"
    sizes = {name: (models[0].spec(name).shape or (1,))[0] for name in tensors}
    for name, parts in tensors.items():
        covered = torch.zeros(sizes[name], dtype=torch.bool)
        for part in parts:
            if name not in left_out and part.rows.stop > sizes[name]:
                raise PlanError(
                    f"{path} measured {part.rows.stop} rows of {name}, which has {sizes[name]}; "
                    "calibrate the models that are merged."
                )
            covered[part.rows] = True
        if not bool(covered.all()):
            left_out.setdefault(name, "only some of its rows were measured")
    kept = {name: tuple(parts) for name, parts in tensors.items() if name not in left_out}
    partly = f" (which saw {done} of {batches} batches)" if done < batches else ""
    partly += f" (layers before were merged by {forward})" if forward else ""
    maps = {
        _found(path, f"{place}.weight", models[0]): Map(place, along)
        for place, along in grams.items()
    }
    measured = (n.split("/")[1] for n in file.specs if _BASE_FISHER.fullmatch(n))
    gradients = {_found(path, parameter, models[0]): parameter for parameter in measured}
    for name in [name for name in gradients if not models[0].spec(name).shape]:
        left_out[name] = "a single number"
        del gradients[name]
    kept_sizes = {name: sizes[name] for name in kept}
    experts = len(models) - 1
    return Guidance(file, kept, kept_sizes, left_out, maps, gradients, experts, forward, partly)


def _found(path: str | Path, parameter: str, base: Checkpoint) -> str:
    """Return a measured parameter's name in the checkpoints.

    Raises:
        PlanError: they lack it.
    """
    name = parameter_name(parameter, base)
    if name is None:
        raise PlanError(
            f"{path} measured {parameter}, which {base.path} lacks; calibrate the models that are "
            "merged."
        )
    return name


def model_digest(checkpoint: Checkpoint) -> str:
    """Return what a calibration knows a model by: names, dtypes, shapes and ends of its tensors.

    Not all values: a calibration must not read a model twice. Fine-tuning changes the ends as well
    as the rest; two copies of one model on two machines have one digest.
    """
    hasher = new_hasher("xxh3-128")
    for name in sorted(checkpoint.specs):
        spec = checkpoint.specs[name]
        hasher.update(f"{name}\0{spec.dtype}\0{list(spec.shape)}\0".encode())
        for start in {0, max(0, spec.numel - _ENDS)}:
            ends = checkpoint.read(name, start, min(spec.numel, start + _ENDS)).contiguous()
            if ends.numel():
                hasher.update(ends.view(torch.uint8).numpy())
    return f"xxh3-128:{hasher.hexdigest()}"


def _nodes(unit: Mapping[str, Any], rows: Mapping[str, Any]) -> Nodes:
    return Nodes(str(unit["name"]), int(rows["start"]), int(rows["step"]), int(unit["nodes"]))


def _check_models(
    path: str | Path, known: Sequence[tuple[str, str]], models: Sequence[Checkpoint]
) -> None:
    """Refuse a calibration of others; its last model is what they were merged to, which is free."""
    if len(known) != len(models) + 1:
        raise PlanError(
            f"{path} is a calibration of {len(known) - 2} experts and {len(models) - 1} are "
            "merged; calibrate these."
        )
    for (name, digest), model in zip(known, models, strict=False):
        if model_digest(model) != digest:
            raise PlanError(
                f"{model.path} is not the {name} that {path} was made with; name the same models "
                "in the same order, or calibrate these."
            )


def parameter_name(parameter: str, checkpoint: Checkpoint) -> str | None:
    """Return a parameter's name in the checkpoint, which may have or lack a prefix."""
    if parameter in checkpoint:
        return checkpoint.aliases.get(parameter, parameter)
    ends = [n for n in checkpoint if n.endswith(f".{parameter}") or parameter.endswith(f".{n}")]
    return ends[0] if len(ends) == 1 else None
