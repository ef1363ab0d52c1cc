"""Fisher information of scaled experts, and the merge that is weighted by it.

theta = theta_0 + K sum_k F_k c_k tau_k / sum_k F_k, element by element, with F_k the diagonal
Fisher information of theta_0 + c_k tau_k on the inputs of task k. Shapes: K experts.

Source: Lee et al. 2025, "DF-Merge", arXiv:2504.18992, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.descent.merge import LearnedMerge
from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError
from mergewell.models.barrier import Head, first_output
from mergewell.models.dataflow import tensors
from mergewell.models.fisher import squared_gradients

_FLOOR = 1e-12
"""Added to every Fisher information, as in the released code."""


class DynamicFisher:
    """The Fisher information of each expert, scaled by its coefficient, on its own task."""

    def __init__(
        self, merge: LearnedMerge, tasks: Sequence[LearningTask], samples: int, seed: int
    ) -> None:
        """Ask the first `samples` of each task; the merge is to be task arithmetic by task.

        Raises:
            DataError: there are not inputs for each expert by itself.
        """
        self._merge, self._samples, self._seed = merge, samples, seed
        self._tasks = {task.expert: task for task in tasks}
        if {*self._tasks} != {*range(len(merge.plan.experts))}:
            raise DataError(
                "df_merge asks on each task how far its expert depends on each weight; give inputs "
                "for each expert by itself."
            )
        self._names = {id(part.target): part.task.name for part in merge.parts}

    def of(self, point: Tensor, expert: int) -> Mapping[str, Tensor]:
        """Return F_k by tensor at theta_0 + c_k tau_k; the module is left there."""
        row = torch.zeros_like(point)
        row[expert] = point[expert]
        with torch.no_grad():
            self._merge.coefficients.copy_(row[None])
        self._merge.place()
        task = self._tasks[expert]
        module = _Headed(self._merge.module, task.head)
        names = {name: self._names.get(id(p)) for name, p in module.named_parameters()}
        total: dict[str, Tensor] = {}
        seen = 0
        for batch in task.batches:
            left = self._samples - seen
            if left <= 0:
                break
            part = (
                batch[:left]
                if isinstance(batch, Tensor)
                else {name: tensor[:left] for name, tensor in batch.items()}
            )
            found = squared_gradients(module, part, "classes", first=seen, seed=self._seed)
            seen += len(tensors(part)[0])
            for name, squares in found.items():
                known = names[name]
                if known is not None:
                    total[known] = squares if known not in total else total[known] + squares
        return {name: squares / seen + _FLOOR for name, squares in total.items()}

    def total(self, point: Tensor) -> Mapping[str, Tensor]:
        """Return sum_k F_k by tensor."""
        found: dict[str, Tensor] = {}
        for expert in range(len(point)):
            for name, fisher in self.of(point, expert).items():
                found[name] = fisher if name not in found else found[name] + fisher
        return found

    def weighted(
        self, point: Tensor, expert: int, total: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return K F_k tau_k / sum_j F_j by tensor, without the coefficient."""
        fisher = self.of(point, expert)
        found: dict[str, Tensor] = {}
        for part in self._merge.parts:
            name = part.task.name
            if name in fisher:
                tau = self._merge.group(part).task_vectors[expert]
                share = len(point) * fisher[name] / total[name]
                found[name] = share.reshape(tau.shape) * tau
        return found

    def place(self, point: Tensor) -> None:
        """Put the weighted merge into the module; two models are held beside it."""
        top: dict[str, Tensor] = {}
        below: dict[str, Tensor] = {}
        for expert in range(len(point)):
            fisher = self.of(point, expert)
            for part in self._merge.parts:
                name, tau = part.task.name, self._merge.group(part).task_vectors[expert]
                weight = fisher[name].reshape(tau.shape) if name in fisher else torch.ones_like(tau)
                moved = weight * (float(point[expert]) * tau)
                top[name] = moved if name not in top else top[name] + moved
                below[name] = weight if name not in below else below[name] + weight
        with torch.no_grad():
            self._merge.coefficients.copy_(point[None])
            for part in self._merge.parts:
                name = part.task.name
                delta = len(point) * top[name] / below[name]
                made = self._merge.group(part).required_base + delta
                part.target.copy_(made.view(part.target.shape))


class _Headed(nn.Module):
    """A module and the head that reads its features."""

    def __init__(self, module: nn.Module, head: Head | None) -> None:
        super().__init__()
        self.whole, self._read = module, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = first_output(self.whole, args[0] if args else kwargs)
        return self._read(output) if self._read is not None else output
