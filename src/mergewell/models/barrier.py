"""The barrier: what the loss does on the straight line between two models.

Answers are labels or, without any, what the ensemble of the two ends answers.
Shapes: N samples, C classes, A points on the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.models.batch_norm import batch_norms, reestimate
from mergewell.models.dataflow import Batch, call, evaluating, tensors
from mergewell.models.loader import load_state

Head = Callable[[Tensor], Tensor]
"""Features [n, ..., D] to logits [n, ..., C]."""

Answers = Literal["labels", "pseudo-labels"]
"""Whether right answers are known, or are what a model answers."""

BatchNorms = Literal["as stored", "re-estimated"]
"""Running statistics on the line: interpolated like weights, or measured anew at each point."""

IGNORED = -100
"""The label of what is not to be judged, such as padding."""


@dataclass(frozen=True, slots=True)
class Path:
    """Losses and accuracies at points of the line from one model to another."""

    start: str
    end: str
    points: tuple[float, ...]
    """Shares of the end, from 0 to 1, [A]."""

    losses: tuple[float, ...]
    """Mean cross-entropy at each point, nats, [A]."""

    accuracies: tuple[float, ...]
    """Fraction of right answers at each point, [A]."""

    linearity: float
    """Mean cosine between the middle's outputs and the mean of the ends' outputs."""

    ends: float
    """Mean cosine between the ends' outputs: what any model between them is held against."""

    answers: Answers
    norms: BatchNorms
    samples: int
    task: str = ""

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the straight line between the ends' losses, >= 0."""
        first, last = self.losses[0], self.losses[-1]
        lines = [(1 - a) * first + a * last for a in self.points]
        return max(loss - line for loss, line in zip(self.losses, lines, strict=True))

    @property
    def accuracy_barrier(self) -> float:
        """Largest fall of the accuracy below the line between the ends' accuracies, >= 0."""
        first, last = self.accuracies[0], self.accuracies[-1]
        lines = [(1 - a) * first + a * last for a in self.points]
        return max(line - found for found, line in zip(self.accuracies, lines, strict=True))


def measure_path(
    module: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    *,
    batches: Sequence[Batch],
    labels: Sequence[Tensor] | None = None,
    head: Head | None = None,
    points: int = 11,
    norms: BatchNorms | None = None,
    names: tuple[str, str] = ("start", "end"),
    task: str = "",
) -> Path:
    """Return losses on the line between two checkpoints, run in one module that is overwritten.

    labels: int64 [n] or [n, T] for each batch, -100 where nothing is judged; without them the
    answers are those of the ends' averaged logits, padding left out by an `attention_mask` [n, T].
    head: from the module's first output to logits; none where these are the logits. BatchNorm's
    running statistics are measured anew at each point unless `norms` says otherwise, or both
    ends hold the same ones (trained in eval mode: measuring anew would ruin them). Each tensor is
    interpolated as it is copied into the module, so no third set of weights is held, but the
    outputs of three points are: choose a head and a number of batches accordingly.

    Source: Frankle et al. 2020, arXiv:1912.05671; methods.md C4. Raises:
        RecipeError: the number of points is even or below 3.
        DataError: no batches, or labels that do not fit them.
        ModelError: the ends have different tensors, or the module gives none.
    """
    if points < 3 or points % 2 == 0:
        raise RecipeError(f"A path of {points} points has no middle; give an odd number from 3 on.")
    if not batches:
        raise DataError("A path was given no batches; give at least one sample of data.")
    if labels is not None and len(labels) != len(batches):
        raise DataError(
            f"{len(labels)} batches of labels are given for {len(batches)} batches; give one each."
        )
    treated = norms or ("as stored" if _same_statistics(start, end) else "re-estimated")
    if not batch_norms(module):
        treated = "as stored"

    def run(share: float) -> list[Tensor]:
        load_state(module, _Between(start, end, share))
        if treated == "re-estimated":
            reestimate(module, batches)
        with evaluating([module]):
            return [first_output(module, batch) for batch in batches]

    def logits(outputs: list[Tensor]) -> list[Tensor]:
        return [head(output) for output in outputs] if head is not None else outputs

    first, last, middle = run(0.0), run(1.0), run(0.5)
    ends = zip(logits(first), logits(last), batches, strict=True)
    answers = labels or [pseudo_labels((a + b) / 2, batch) for a, b, batch in ends]
    shares = [index / (points - 1) for index in range(points)]
    known = {0.0: first, 0.5: middle, 1.0: last}
    scores = [
        score(logits(known[share] if share in known else run(share)), answers) for share in shares
    ]
    means = [(a + b) / 2 for a, b in zip(first, last, strict=True)]
    return Path(
        names[0],
        names[1],
        tuple(shares),
        tuple(loss for loss, _ in scores),
        tuple(accuracy for _, accuracy in scores),
        _cosine(middle, means),
        _cosine(first, last),
        "pseudo-labels" if labels is None else "labels",
        treated,
        sum(int((answer != IGNORED).sum()) for answer in answers),
        task,
    )


def pseudo_labels(logits: Tensor, batch: Batch) -> Tensor:
    """Return the answers [n] or [n, T] of logits [n, ..., C], -100 at padding.

    Padding is what the batch's `attention_mask` [n, T] leaves out, where the logits are [n, T, C].
    """
    answers = logits.argmax(-1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == answers.shape:
        answers = answers.masked_fill(mask == 0, IGNORED)
    return answers


def score(logits: Sequence[Tensor], answers: Sequence[Tensor]) -> tuple[float, float]:
    """Return mean cross-entropy in nats, and accuracy, over all batches.

    Raises:
        DataError: labels of another shape than the logits, or none at all that is judged.
    """
    loss = right = count = 0.0
    for batch, answer in zip(logits, answers, strict=True):
        loss += float(summed_loss(batch, answer))
        judged = answer != IGNORED
        right += float((batch.argmax(-1) == answer)[judged].sum())
        count += float(judged.sum())
    if count == 0:
        raise DataError("No answer is left to be judged; give labels other than -100.")
    return loss / count, right / count


def summed_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of logits [n, ..., C] over what is judged.

    Raises:
        DataError: the answers are not one for each row of logits.
    """
    if logits.shape[:-1] != answers.shape:
        raise DataError(
            f"Labels of shape {list(answers.shape)} do not fit logits of shape "
            f"{list(logits.shape)}; give one label for each row of logits."
        )
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return functional.cross_entropy(flat, answers.reshape(-1), reduction="sum")


def first_output(module: nn.Module, batch: Batch) -> Tensor:
    """Return the first tensor that a module gives for a batch.

    Raises:
        ModelError: it gives none.
    """
    found = tensors(call(module, batch))
    if not found:
        raise ModelError(f"{type(module).__name__} returns no tensor; wrap it so that it does.")
    return found[0]


class _Between(Mapping[str, Tensor]):
    """A checkpoint on the line between two: each tensor is made when it is asked for."""

    def __init__(
        self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
    ) -> None:
        if lacking := sorted(set(start) ^ set(end)):
            raise ModelError(
                f"{lacking[0]} is in only one of the path's ends; name two models of one "
                "architecture."
            )
        self._start, self._end, self._share = start, end, share

    def __getitem__(self, name: str) -> Tensor:
        start = self._start[name]
        if not start.is_floating_point():
            return start
        wide = torch.promote_types(start.dtype, torch.float32)
        return torch.lerp(start.to(wide), self._end[name].to(wide), self._share)

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


def _same_statistics(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> bool:
    names = [n for n in start if n.rpartition(".")[2] in ("running_mean", "running_var")]
    return all(n in end and torch.equal(start[n], end[n]) for n in names)


def _cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the mean cosine between samples; those of no length are left out."""
    total = count = 0.0
    for a, b in zip(left, right, strict=True):
        a, b = a.flatten(1).double(), b.flatten(1).double()
        held = (a != 0).any(1) & (b != 0).any(1)
        total += float(functional.cosine_similarity(a[held], b[held], dim=1).sum())
        count += float(held.sum())
    return total / count if count else float("nan")
