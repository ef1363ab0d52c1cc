"""Pairs: at each module in turn, what the merged model gives it and what each expert made of it.

The merged model walks over all inputs; beside it every expert walks over those of its own task, on
its own path. When all have come to a module it is solved for, and the merged model goes on with
what was found. One module of every model is in memory, and the states of all passes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from typing import Any

from torch import Tensor, nn

from mergewell.calibration.data import Data, Memory
from mergewell.calibration.models import MERGED, expert_names, skeletons
from mergewell.distil.outputs import first, fresh
from mergewell.engines.base import one_thread_a_worker
from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.models.dataflow import evaluating
from mergewell.models.skeleton import Fetching, Skeleton
from mergewell.models.spill import Spill
from mergewell.models.walk import LANES, Call, Step, Walk
from mergewell.plan import Plan

OnStep = Callable[[str, int, int], None]

Solve = Callable[[str, nn.Module, Mapping[int, Call], Mapping[int, Tensor]], object]
"""Called with a module's name, the merged model's module, the calls of it that wait, by batch, and
the first tensor that the batch's own expert gave there. It may change the module's weights."""


def walk_pairs(plan: Plan, data: Data, solve: Solve, *, on_step: OnStep | None = None) -> None:
    """Walk through the network, and have every module solved for before the next is looked at.

    Raises:
        RecipeError: the plan has no base.
        DataError: a batch of no known expert, or more batches than can wait at a time.
        ModelError: a module with weights is run twice, or models go different ways.
        UserError: checkpoints, models or data that do not fit one another.
    """
    if plan.base is None:
        raise RecipeError("Task vectors are learned layer by layer; name the base.")
    if len(data.batches) > LANES:
        raise DataError(
            f"{len(data.batches)} batches cannot wait for a layer to be learned; give {LANES} at "
            "most."
        )
    if len(data.owners) != len(data.batches):
        raise DataError("Each batch needs its own expert; give inputs for each by itself.")
    made = skeletons(plan, plan.base, data)
    memory = Memory()
    with ExitStack() as stack:
        stack.enter_context(one_thread_a_worker())
        # around all walks, which end in another order than they began in
        stack.enter_context(evaluating([made[MERGED].module]))
        spill = stack.enter_context(Spill(memory.activations, memory.folder))

        def walking(name: str, numbers: Sequence[int], before: Any = None) -> Walk:
            batches = [data.batches[number] for number in numbers]
            return Walk({name: made[name]}, batches, spill=spill, before=before, keep_below=0)

        teachers = _Teachers()
        for number, name in enumerate(expert_names(plan)):
            own = [i for i, owner in enumerate(data.owners) if owner == number]
            if own:
                steps = stack.enter_context(closing(walking(name, own).steps()))
                teachers.add(name, own, steps)
        done: set[str] = set()

        def before(module: str, waiting: Mapping[int, Mapping[str, Call]]) -> None:
            targets = teachers.at(module)
            if module in done:
                raise ModelError(
                    f"{module} is run more than once in a forward pass, so it cannot be learned "
                    "on the way; use distillation."
                )
            done.add(module)
            part = made[MERGED].module.get_submodule(module)
            calls = {index: each[MERGED] for index, each in waiting.items()}
            if set(calls) != set(targets):
                raise ModelError(f"Inputs do not all come to {module} together; use distillation.")
            _fetch(made[MERGED], part, next(iter(calls.values())))
            solve(module, part, calls, targets)

        walk = walking(MERGED, range(len(data.batches)), before)
        with closing(walk.steps()) as steps:
            for number, _ in enumerate(steps, 1):
                if on_step is not None:
                    on_step("layers", min(number, walk.length), walk.length)


class _Teachers:
    """The experts' walks, each over its own batches."""

    def __init__(self) -> None:
        self._walks: list[tuple[str, list[int], Generator[Step]]] = []

    def add(self, name: str, own: list[int], steps: Generator[Step]) -> None:
        """Add the walk of an expert over the batches with these numbers."""
        self._walks.append((name, own, steps))

    def at(self, module: str) -> dict[int, Tensor]:
        """Let every expert go through its next module and return what it gave, by batch."""
        found: dict[int, Tensor] = {}
        for name, own, steps in self._walks:
            # a batch that is through comes with its end, before the next batch's last module
            here = islice((step for step in steps if step.module is not None), len(own))
            for step in here:
                if step.module != module:
                    raise ModelError(
                        f"The models do not call their modules in the same order: the merged one "
                        f"goes on to {module}, {name} to {step.module}; use distillation."
                    )
                found[own[step.index]] = first(step.outputs[name], module)
        return found


def _fetch(skeleton: Skeleton, part: nn.Module, request: Call) -> None:
    """Have the weights there that a module uses without owning them."""
    with Fetching(skeleton, skeleton.keep):
        args, kwargs = fresh(request)
        part(*args, **kwargs)
