"""Labelled inputs: what is read as unlabelled inputs, with an entry `labels` taken out if there.

Shapes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from mergewell.errors import DataError, ModelError
from mergewell.inputs import batches, load_inputs
from mergewell.models.dataflow import Batch, call, evaluating, tensors

LABELS = "labels"
"""The entry of a data file that is no input."""


@dataclass(frozen=True, slots=True)
class LabelledInputs:
    """Inputs in batches, with the right answers where they are known."""

    batches: tuple[Batch, ...]

    labels: Tensor | None = None
    """Whole numbers from 0, [N], in the order of the batches."""

    @property
    def samples(self) -> int:
        """N."""
        return sum(_samples(batch) for batch in self.batches)

    @property
    def labels_by_batch(self) -> tuple[Tensor, ...]:
        """The labels of each batch, or nothing where they are not known."""
        if self.labels is None:
            return ()
        sizes = [_samples(batch) for batch in self.batches]
        return torch.split(self.labels, sizes)  # pyright: ignore[reportUnknownVariableType]


def load_labelled(
    path: str | Path,
    *,
    model_folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 128,
) -> LabelledInputs:
    """Return the inputs of a file or folder as `inputs.load_inputs` reads them, and their labels.

    Labels are the entry `labels`, [N], of a `.npz` or `.safetensors`; other kinds have none.

    Raises:
        DataError: the data cannot be read, hold labels and nothing else, or labels that are not one
            row of whole numbers from 0.
    """
    inputs = load_inputs(path, model_folder=model_folder, limit=limit)
    if isinstance(inputs, Tensor) or LABELS not in inputs:
        return cut(inputs, None, batch_size)
    labels = inputs[LABELS]
    rest: dict[str, Tensor] = {name: t for name, t in inputs.items() if name != LABELS}
    if labels.dim() != 1 or labels.is_floating_point() or int(labels.min()) < 0:
        raise DataError(
            f"{path}: `{LABELS}` must be one row of whole numbers from 0, one for each sample."
        )
    if not rest:
        raise DataError(f"{path} holds labels and no inputs; add the inputs.")
    return cut(next(iter(rest.values())) if len(rest) == 1 else rest, labels.long(), batch_size)


def cut(inputs: Batch, labels: Tensor | None, batch_size: int = 128) -> LabelledInputs:
    """Return inputs in batches of equal size but for one sample, none larger than `batch_size`."""
    total = _samples(inputs)
    # a last batch of one sample would have no variance to measure
    size = ceil(total / ceil(total / batch_size))
    return LabelledInputs(tuple(batches(inputs, size)), labels)


def halves(data: LabelledInputs) -> tuple[LabelledInputs, LabelledInputs]:
    """Return the samples at even places, to choose on, and those at odd places, to judge on.

    Raises:
        DataError: fewer than four samples.
    """
    if data.samples < 4:
        raise DataError(f"{data.samples} samples cannot be split to choose and judge; give more.")
    whole = joined_inputs(data.batches)
    size = max(_samples(batch) for batch in data.batches)
    found: list[LabelledInputs] = []
    for start in (0, 1):
        part: Batch = (
            whole[start::2]
            if isinstance(whole, Tensor)
            else {name: tensor[start::2] for name, tensor in whole.items()}
        )
        labels = None if data.labels is None else data.labels[start::2]
        found.append(cut(part, labels, size))
    return found[0], found[1]


def joined_labelled(parts: Sequence[LabelledInputs]) -> LabelledInputs:
    """Return the batches of several as one's; labelled if all of them are."""
    labels = [part.labels for part in parts if part.labels is not None]
    return LabelledInputs(
        tuple(batch for part in parts for batch in part.batches),
        torch.cat(labels) if len(labels) == len(parts) else None,
    )


def joined_inputs(parts: Sequence[Batch]) -> Batch:
    """Return batches as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return {
        name: torch.cat([part[name] for part in parts if not isinstance(part, Tensor)])
        for name in first
    }


def accuracy(module: nn.Module, data: LabelledInputs) -> float:
    """Return the fraction of right answers of a module that gives logits [n, C].

    Raises:
        DataError: the data have no labels, or the module gives no row of logits a sample.
        ModelError: the module gives no tensor.
    """
    if data.labels is None:
        raise DataError(f"Accuracy needs labelled data; add an entry `{LABELS}` to the file.")
    answers: list[Tensor] = []
    with evaluating([module]):
        for batch in data.batches:
            logits = first_output(module, call(module, batch))
            if logits.dim() != 2 or len(logits) != _samples(batch):
                raise DataError(
                    f"{type(module).__name__} makes {tuple(logits.shape)} of {_samples(batch)} "
                    "samples; it must give one row of logits a sample."
                )
            answers.append(logits.argmax(-1).cpu())
    return float((torch.cat(answers) == data.labels).double().mean())


def first_output(module: nn.Module, output: object) -> Tensor:
    """Return a module's output, or the first tensor in it.

    Raises:
        ModelError: there is none.
    """
    found = tensors(output)
    if not found:
        raise ModelError(f"{type(module).__name__} returns no tensor; wrap it so that it does.")
    return found[0]


def _samples(batch: Batch) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))
