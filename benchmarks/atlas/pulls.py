"""Where tasks pull: gradients at the base, the experts and the merge, and barriers between experts.

Of labels (budget l) and of each expert's own answers (budget u), on 16 inputs a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from experts import Expert
from family import Family, State
from predictors import Numbers, diagnosed, gradient_pairs, spread
from torch import Tensor, nn

from mergewell.diagnostics.base import Evidence
from mergewell.models.barrier import measure_path
from mergewell.models.gradients import Lesson, gradient_products, own_answers
from mergewell.models.loader import load_state

POINTS = 5
"""Models on the path between two experts, of which barriers are measured."""
BARRIERS = 3
"""Experts of a set up to which barriers of pairs are measured."""


class Pulls:
    """Gradients and barriers of experts, kept for the sets that they come back in."""

    def __init__(
        self, family: Family, spare: nn.Module, state: Callable[[str], State], most: int
    ) -> None:
        """`spare` is a module to overwrite, `most` how many experts' gradients are held."""
        self.of, self._spare, self._state, self._most = family, spare, state, most
        self._barriers: dict[tuple[str, str], list[float]] = {}
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def of_set(
        self, known: Mapping[str, Any], base: State, experts: Sequence[Expert],
        modules: Sequence[nn.Module],
    ) -> Numbers:  # fmt: skip
        """Return what gradients at the base and at the experts, and barriers of pairs, say."""
        load_state(self._spare, base)
        found = self._at(self._spare, "base", known, experts, modules)
        own = [self._own(expert) for expert in experts]
        found |= gradient_pairs([weights for weights, _ in own], "l_own_gradient")
        found |= gradient_pairs([inputs for _, inputs in own], "l_input_gradient")
        if len(experts) <= BARRIERS:
            pairs = [
                value
                for i, one in enumerate(experts)
                for other in experts[:i]
                for value in self._barrier(other, one)
            ]
            found |= spread("l_pair_barrier", pairs)
        return found

    def of_merge(
        self, module: nn.Module, known: Mapping[str, Any], experts: Sequence[Expert],
        modules: Sequence[nn.Module],
    ) -> Numbers:  # fmt: skip
        """Return what gradients at the merged model say."""
        return self._at(module, "merged", known, experts, modules)

    def _at(
        self, module: nn.Module, at: str, known: Mapping[str, Any], experts: Sequence[Expert],
        modules: Sequence[nn.Module],
    ) -> Numbers:  # fmt: skip
        found: Numbers = {}
        for budget in ("u", "l"):
            lessons = [
                self._lesson(expert, expert_module, labels=budget == "l")
                for expert, expert_module in zip(experts, modules, strict=False)
            ]
            gradients = gradient_products(module, lessons, at=at, wanted=self.of.trained)
            total = torch.stack(list(gradients.products.values())).sum(0)
            norms = total.diagonal().clamp(min=0).sqrt()
            found[f"{budget}_gradient_norm_{at}"] = float(norms.mean())
            evidence = Evidence(**known, gradients=[gradients])
            found |= diagnosed(evidence, only=["gradient_distance"], budget=budget)
        return found

    def _lesson(self, expert: Expert, module: nn.Module, *, labels: bool) -> Lesson:
        """Return what an expert's task teaches: right answers, or the expert's own."""
        part, head = self.of.inputs(expert.task), self.of.head(expert.base, expert.task)

        def logits(output: Tensor) -> Tensor:
            return self.of.logits(output, head)

        if labels:
            return Lesson(expert.name, part.batches, part.labels, logits, "labels")
        return own_answers(module, expert.name, part.batches, logits)

    def _barrier(self, one: Expert, other: Expert) -> list[float]:
        """Return the loss barriers on the labelled inputs of both experts' tasks."""
        key = (one.name, other.name)
        if key not in self._barriers:
            self._barriers[key] = []
            for expert in (one, other):
                part = self.of.inputs(expert.task)
                head = self.of.head(expert.base, expert.task)
                path = measure_path(
                    self._spare, self._state(one.name), self._state(other.name),
                    batches=part.batches, labels=part.labels, points=POINTS, norms="as stored",
                    head=lambda output, head=head: self.of.logits(output, head),
                )  # fmt: skip
                self._barriers[key].append(path.barrier)
        return self._barriers[key]

    def _own(self, expert: Expert) -> tuple[Tensor, Tensor]:
        """Return the gradients of an expert's loss on labels: of its weights, of the inputs, flat.

        Source: arXiv:2601.22285 (methods.md C9), each gradient at its own expert.
        """
        if expert.name in self._gradients:
            return self._gradients[expert.name]
        module = self._spare.requires_grad_(True)
        load_state(module, self._state(expert.name))
        part, head = self.of.inputs(expert.task), self.of.head(expert.base, expert.task)
        weights = [p for n, p in module.named_parameters() if self.of.trained(n)]
        total, inputs = [], []
        with torch.enable_grad():
            for batch, labels in zip(part.batches, part.labels, strict=True):
                given = self.of.differentiable(module, batch)
                loss = nn.functional.cross_entropy(self.of.logits(given.output, head), labels)
                *found, last = torch.autograd.grad(
                    loss, [*weights, given.inputs], materialize_grads=True
                )
                total.append(torch.cat([g.flatten() for g in found]))
                # texts differ in their tokens, so these are summed
                inputs.append((last.sum(1) if last.ndim == 3 else last).flatten())
        if len(self._gradients) >= self._most:
            self._gradients.pop(next(iter(self._gradients)))
        self._gradients[expert.name] = (torch.stack(total).mean(0), torch.cat(inputs))
        return self._gradients[expert.name]
