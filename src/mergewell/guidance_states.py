"""States of a calibration as values of single tensors: Gram matrices and Fisher information.

Shapes: K experts, G groups of inputs, I inputs of a group, R rows of a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.storage.weight_file import SafetensorsFile


@dataclass(frozen=True, slots=True)
class Map:
    """A linear map whose inputs' Gram matrices are known."""

    place: str
    """What the calibration calls it."""

    along: int
    """The dimension of its weight that counts inputs."""


def gram_values(file: SafetensorsFile, known: Map, experts: int) -> dict[str, Tensor]:
    """Return `gram` [K, G, I, I], `gram_rows` [K] and `gram_along` [] of a map's inputs.

    Of an expert that was given none they are 0. Raises:
        CheckpointError: they are damaged.
    """
    grams: list[Tensor | None] = []
    rows: list[float] = []
    for number in range(1, experts + 1):
        key = f"gram/{known.place}/expert {number}"
        if f"{key}/gram" not in file.specs:
            grams.append(None)
            rows.append(0.0)
            continue
        gram = _read(file, f"{key}/gram").to(torch.float64)
        grams.append(gram if gram.dim() == 3 else gram[None])
        rows.append(float(_read(file, f"{key}/count")))
    found = [gram for gram in grams if gram is not None]
    shapes = {tuple(gram.shape) for gram in found}
    if len(shapes) != 1 or not all(bool(gram.isfinite().all()) for gram in found):
        raise CheckpointError(
            f"{file.path}: the Gram matrices of {known.place} are not of one shape and finite; "
            "calibrate again."
        )
    nothing = torch.zeros_like(found[0])
    return {
        "gram": torch.stack([nothing if gram is None else gram for gram in grams]),
        "gram_rows": torch.tensor(rows, dtype=torch.float64),
        "gram_along": torch.tensor(known.along),
    }


def fisher_values(
    file: SafetensorsFile, parameter: str, experts: int, rows: tuple[int, int | None]
) -> dict[str, Tensor]:
    """Return what is known of a parameter's gradients, of rows [start, stop).

    `fisher` [K, R, ...], `fisher_base` [R, ...] and `fisher_samples` [K + 1], the base's first; 0
    of an expert that was given no inputs. Raises:
        CheckpointError: they are damaged.
    """
    shape = file.specs[f"fisher/{parameter}/base/squares"].shape
    row, (start, stop, _) = math.prod(shape[1:]), slice(*rows).indices(shape[0])
    found: list[Tensor] = []
    counts: list[float] = []
    for model in ["base", *(f"expert {number}" for number in range(1, experts + 1))]:
        key = f"fisher/{parameter}/{model}"
        if f"{key}/squares" not in file.specs:
            found.append(torch.zeros(stop - start, *shape[1:], dtype=torch.float64))
            counts.append(0.0)
            continue
        part = file.read(f"{key}/squares", start * row, stop * row).to(torch.float64)
        counts.append(float(_read(file, f"{key}/count")))
        found.append(part.view(-1, *shape[1:]) / counts[-1])
        if not bool((found[-1] >= 0).all()):
            raise CheckpointError(
                f"{file.path}: the Fisher information of {parameter} is negative or not a number; "
                "calibrate again."
            )
    return {
        "fisher": torch.stack(found[1:]),
        "fisher_base": found[0],
        "fisher_samples": torch.tensor(counts, dtype=torch.float64),
    }


def _read(file: SafetensorsFile, name: str) -> Tensor:
    if name not in file.specs:
        raise CheckpointError(f"{file.path}: {name} is missing; calibrate again.")
    spec = file.specs[name]
    return file.read(name, 0, spec.numel).view(spec.shape)
