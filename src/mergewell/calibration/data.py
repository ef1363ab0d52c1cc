"""What a calibration is made from: data, how to run models on them, and how much memory to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mergewell.errors import DataError
from mergewell.models.capture import Mode
from mergewell.models.dataflow import Batch, tensors
from mergewell.models.fisher import Likelihood
from mergewell.models.units import CHEAP, Kind
from mergewell.models.walk import AROUND
from mergewell.storage.manifest import Hasher, new_hasher


@dataclass(frozen=True, slots=True)
class Data:
    """Unlabelled inputs, the architecture that takes them, and what to gather."""

    factory: Callable[[], nn.Module]
    """Makes a module in eval mode, with whatever weights; called once, and copied."""

    batches: Sequence[Batch]
    """All batches; a shard takes some of them."""

    samples: int
    mode: Mode = "merged"

    kinds: tuple[Kind, ...] = CHEAP
    """The kinds of units that M-Loss is measured on."""

    merged_layers: bool = False
    """Whether the merged model's own layers are the merged side of M-Loss, not the mean."""

    gram: bool = False
    """Whether Gram matrices of the experts' linear layers are gathered: I^2 numbers a layer."""

    fisher: Likelihood | None = None
    """Whether Fisher information is gathered, and how the outputs are read; see `models.fisher`."""

    owners: Sequence[int] = ()
    """For each batch, the number from 0 of the expert whose task it is of; none if it is of all.

    An expert's Gram matrices and Fisher information are made of its own batches; all else that is
    gathered takes all batches.
    """

    def samples_in(self, number: int) -> int:
        """Return the number of samples in a batch."""
        return len(tensors(self.batches[number])[0])

    def owner_of(self, experts: int) -> dict[int, str]:
        """Return the expert's name for each batch, by the batch's identity, where it has one.

        Raises:
            DataError: an expert's number is missing for a batch, or is that of none of `experts`.
        """
        if not self.owners:
            return {}
        if len(self.owners) != len(self.batches) or not {*self.owners} <= {*range(experts)}:
            raise DataError(
                f"{len(self.batches)} batches belong to experts {sorted({*self.owners})} of "
                f"{experts}; name one from 0 on for each batch, or none at all."
            )
        return {
            id(batch): expert_name(owner)
            for batch, owner in zip(self.batches, self.owners, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """How much a walk may hold; all models' weights of one piece come on top, in float32."""

    weights: int = AROUND
    """Bytes of weights, of all models together, up to which they are read once and kept."""

    activations: int = 1 << 30
    """Bytes of activations that wait in memory; more of them go to files."""

    folder: Path | None = None
    """Where those files are; the system's folder for temporary files if absent."""


def fingerprint(batches: Sequence[Batch]) -> str:
    """Return a hash of inputs: names, dtypes, shapes and values, batch by batch."""
    hasher = new_hasher("xxh3-128")
    for batch in batches:
        named = {"": batch} if isinstance(batch, Tensor) else dict(batch)
        for name in sorted(named):
            describe(hasher, name, named[name].dtype, tuple(named[name].shape))
            add(hasher, named[name])
    return f"xxh3-128:{hasher.hexdigest()}"


def first_samples(batches: Sequence[Batch], count: int = 2) -> Batch:
    """Return the first samples of the first batch, enough to trace a module."""
    first = batches[0]
    if isinstance(first, Tensor):
        return first[:count]
    return {name: tensor[:count] for name, tensor in first.items()}


def expert_name(number: int) -> str:
    """Return what the expert of a number from 0 on is called: `expert 1`, `expert 2`, ..."""
    return f"expert {number + 1}"


def kept(batch: Batch, hidden: Tensor) -> Tensor | None:
    """Return which tokens of [N, T, D] or [N * T, D] are no padding, if the batch says so.

    The result has the shape of `hidden` without D.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and hidden.shape[:-1] == (mask.numel(),) and mask.numel() != len(mask):
        mask = mask.flatten()
    if mask is None or hidden.shape[:-1] != mask.shape:
        return None
    return mask.to(torch.bool)


def describe(hasher: Hasher, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Add what a header says of a tensor to a hash."""
    hasher.update(f"{name}\0{dtype}\0{list(shape)}\0".encode())


def add(hasher: Hasher, tensor: Tensor) -> None:
    """Add a tensor's values to a hash."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        hasher.update(flat.view(torch.uint8).numpy())
