"""LearnedMerge: a module whose weights are a merge, and the coefficients' gradients.

The chain rule is cut at the weights: the module's backward pass gives the gradient of each merged
weight, and `method.merge` is differentiated tensor by tensor from there. So one model and one
tensor's group suffice; what fits a budget is kept and the rest is read again at every step.
Beside coefficients an `Adjustment` of the experts can be learned, by the same chain.

Shapes: G groups of tensors, K experts.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mergewell.blocks import Block, Values, group_of
from mergewell.descent.adjustment import Adjustment
from mergewell.errors import MethodError, ModelError
from mergewell.models.loader import load_state, placed
from mergewell.plan import Plan, TensorTask, make_plan
from mergewell.recipe import Recipe, Rule
from mergewell.run import measure_weights, merge_tensors
from mergewell.statistics.base import WeightStatistic
from mergewell.tensor_group import TensorGroup

Per = Literal["task", "layer", "tensor"]
"""Coefficients for the whole model, one an expert, for each layer (see `layer_of`), or tensor."""

_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")

HELD = 4 << 30
"""Bytes of the models' tensors that are kept between steps."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the merge that the experts moved, and where its weights go."""

    task: TensorTask
    target: Tensor
    """The module's parameter or buffer."""

    row: int
    """Its row of the coefficients."""

    values: Values
    """The method's statistics."""


class LearnedMerge:
    """A recipe's merge in a module, with coefficients [G, K] that can be learned.

    Tensors that no expert moved, and those under a rule with a method of its own, stay as the
    recipe has them; with one coefficient an expert so do those under a rule with coefficients.
    """

    def __init__(
        self,
        recipe: Recipe,
        module: nn.Module,
        *,
        per: Per = "tensor",
        adjustment: Adjustment | None = None,
        held: int = HELD,
    ) -> None:
        """Make the merge, put it into the module, and make room for the coefficients.

        Raises:
            PlanError, CheckpointError: as `make_plan`.
            ModelError: the checkpoint does not fit the module, or no expert moved a tensor.
        """
        self.plan: Plan = make_plan(recipe)
        self.module = module
        self.per: Per = per
        load_state(module, dict(merge_tensors(self.plan)))
        learned = [task for task in self.plan.tasks.values() if self._is_learned(task)]
        targets = placed(module, list(self.plan.tasks))
        values = _statistics(self.plan, learned)
        rows: dict[str, int] = {}
        self.parts = tuple(
            Part(
                task,
                targets[task.name],
                rows.setdefault(_row_key(per, task.name), len(rows)),
                values.get(task.name, {}),
            )
            for task in learned
            if task.name in targets
        )
        if not self.parts:
            raise ModelError(
                "No expert moved a tensor of the module; check that the experts are not the base."
            )
        # a row starts at the coefficients of its first tensor
        start = {part.row: part.task.coefficients for part in reversed(self.parts)}
        self.coefficients = torch.tensor(
            [start[row] for row in range(len(rows))], dtype=torch.float64
        ).requires_grad_()
        self._kept: dict[str, TensorGroup] = {}
        self._room = held
        self.adjustment = adjustment
        self.leaves: dict[str, Tensor] = {}
        """What the adjustment learns, by tensor."""
        if adjustment is not None:
            for part in self.parts:
                leaf = adjustment.start(_reshaped(self.group(part), part.task.spec.shape))
                if leaf is not None:
                    self.leaves[part.task.name] = leaf.requires_grad_()
            self.place()

    @property
    def weights(self) -> list[nn.Parameter]:
        """The module's parameters whose gradients are wanted."""
        return [part.target for part in self.parts if isinstance(part.target, nn.Parameter)]

    def place(self) -> None:
        """Put the merge at the present coefficients into the module."""
        if self.adjustment is not None:
            self.adjustment.advance()
        with torch.no_grad():
            for part in self.parts:
                merged = part.task.method.merge(self.adjusted(part))
                part.target.copy_(merged.view(part.target.shape))

    def gradient(self) -> Tensor:
        """Return the gradient of the coefficients, [G, K], from those that the weights hold.

        The leaves get theirs as `.grad`. Buffers, such as BatchNorm's running statistics, follow
        the coefficients and send nothing back.

        Raises:
            MethodError: the method's result does not depend on its coefficients.
        """
        found = torch.zeros_like(self.coefficients)
        for part in self.parts:
            upstream, leaf = part.target.grad, self.leaves.get(part.task.name)
            if leaf is not None:
                leaf.grad = None
            if upstream is None:
                continue
            row = self.coefficients[part.row].detach().requires_grad_()
            with torch.enable_grad():
                merged = part.task.method.merge(self._adjusted(part, row, leaf))
            if not merged.requires_grad:
                raise MethodError(
                    f"{part.task.treatment} gives {part.task.name} whatever the coefficients are; "
                    "learn them for another method, such as task_arithmetic."
                )
            asked = [row] if leaf is None else [row, leaf]
            # channels-last gradients cannot be viewed
            upstream = upstream.to(merged.dtype).reshape(merged.shape)
            back = torch.autograd.grad(merged, asked, upstream)
            found[part.row] += back[0]
            if leaf is not None:
                leaf.grad = back[1]
        return found

    def recipe(self) -> Recipe:
        """Return the recipe with the present coefficients: the experts', or a rule a tensor."""
        recipe = self.plan.recipe
        rows = [tuple(float(c) for c in row) for row in self.coefficients.detach()]
        if self.per == "task":
            experts = [
                expert.model_copy(update={"coefficient": c})
                for expert, c in zip(recipe.experts, rows[0], strict=True)
            ]
            return recipe.model_copy(update={"experts": (*experts,)})
        learned = [
            Rule(
                match=glob.escape(part.task.name),
                coefficients=rows[part.row],
            )
            for part in self.parts
        ]
        return recipe.model_copy(update={"rules": (*learned, *recipe.rules)})

    def _is_learned(self, task: TensorTask) -> bool:
        rule = self.plan.recipe.rule_for(task.name)
        if task.copied_from is not None or (rule is not None and rule.method is not None):
            return False
        if self.per == "task" and rule is not None and rule.coefficients is not None:
            return False
        first, *others = self.plan.inputs
        return any(not torch.equal(first[task.name], other[task.name]) for other in others)

    def adjusted(self, part: Part) -> TensorGroup:
        """Return a tensor's group with the present coefficients, and its experts adjusted."""
        return self._adjusted(part, self.coefficients[part.row], self.leaves.get(part.task.name))

    def _adjusted(self, part: Part, row: Tensor, leaf: Tensor | None) -> TensorGroup:
        group = self.group(part)
        group = replace(group, coefficients=row.to(group.experts[0].dtype))
        if self.adjustment is None or leaf is None:
            return group
        # methods on elements see flat tensors, an adjustment the tensor's own shape
        shape = group.experts[0].shape
        whole = self.adjustment.adjusted(_reshaped(group, part.task.spec.shape), leaf)
        return _reshaped(whole, shape)

    def group(self, part: Part) -> TensorGroup:
        """Return a tensor's group in the module's dtype, with the recipe's own coefficients."""
        name = part.task.name
        group = self._kept.get(name)
        if group is None:
            dtype = part.target.dtype
            whole = Block(part.task, 0, part.task.spec.numel)
            wide = group_of(self.plan, whole, part.values)
            group = replace(
                wide,
                experts=tuple(expert.to(dtype) for expert in wide.experts),
                base=None if wide.base is None else wide.base.to(dtype),
            )
            size = sum(expert.nbytes for expert in group.experts)
            if size <= self._room:
                self._room -= size
                self._kept[name] = group
        return group


def layer_of(name: str) -> str:
    """Return the layer of a tensor: its name up to the first number, or its module's name."""
    found = _NUMBERED.match(name)
    return found.group() if found else name.rpartition(".")[0]


def _reshaped(group: TensorGroup, shape: Sequence[int]) -> TensorGroup:
    return replace(
        group,
        experts=tuple(expert.reshape(shape) for expert in group.experts),
        base=None if group.base is None else group.base.reshape(shape),
    )


def _row_key(per: Per, name: str) -> str:
    return {"task": "", "layer": layer_of(name), "tensor": name}[per]


def _statistics(plan: Plan, tasks: Sequence[TensorTask]) -> Mapping[str, Values]:
    """Return the values of the methods' statistics, by tensor; one of the whole model sees all."""
    users: dict[WeightStatistic, dict[str, TensorTask]] = {}
    for task in plan.tasks.values():
        if task.copied_from is None:
            for statistic in task.method.statistics():
                users.setdefault(statistic, {})[task.name] = task
    wanted = {task.name for task in tasks}
    values: dict[str, dict[WeightStatistic, Mapping[str, Tensor]]] = {}
    for statistic, known in users.items():
        for name, value in measure_weights(replace(plan, tasks=known), [statistic]).items():
            if name in wanted:
                values.setdefault(name, {}).update(value)
    return values
