"""Gram matrices of a forward pass in which every layer is merged before the next is looked at.

All batches wait at a block. Each expert's own block is run on what the merged model gives it, the
inputs of its linear maps make Gram matrices, the block is merged by them, and the merged model goes
on. Source: Nguyen et al. 2025, "RegMean++", arXiv:2508.03121, algorithm 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing

import torch
from torch import Tensor

from mergewell.blocks import compute_dtype
from mergewell.calibration.collect import OnStep
from mergewell.calibration.data import Data, Memory, fingerprint, kept
from mergewell.calibration.models import BASE, MERGED, described, expert_names, simplex, skeletons
from mergewell.calibration.result import Calibration, Head
from mergewell.engines.base import one_thread_a_worker
from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.guidance import parameter_name
from mergewell.methods.base import MergeMethod
from mergewell.models.dataflow import Batch, evaluating
from mergewell.models.maps import MapCall, WatchingMaps, weights
from mergewell.models.skeleton import Fetching
from mergewell.models.spill import Spill
from mergewell.models.walk import LANES, Call, Walk
from mergewell.plan import Plan
from mergewell.statistics.activation_gram import ActivationGram, LayerInputs
from mergewell.statistics.base import State
from mergewell.tensor_group import TensorGroup


def calibrate_forward(
    plan: Plan,
    data: Data,
    method: MergeMethod,
    *,
    memory: Memory | None = None,
    on_step: OnStep | None = None,
) -> Calibration:
    """Return the Gram matrices that a method, merging block by block, needs.

    The plan names base, experts and coefficients; its own method merges what has no Gram matrix.
    One piece of every model is in memory at a time.

    Raises:
        RecipeError: the plan has no base.
        DataError: there are more batches than can wait at a time.
        ModelError: a layer with weights is run twice in one forward pass.
        UserError: checkpoints, models or data that do not fit one another.
    """
    if plan.base is None:
        raise RecipeError("A calibration needs the base of the experts; name it with --base.")
    if len(data.batches) > LANES:
        raise DataError(
            f"{len(data.batches)} batches cannot wait for a layer to be merged; give {LANES} at "
            "most."
        )
    limits = memory or Memory()
    with one_thread_a_worker(), Spill(limits.activations, limits.folder) as spill:
        merger = _Merger(plan, data, method)
        walk = Walk(
            {MERGED: merger.skeletons[MERGED]},
            data.batches,
            spill=spill,
            before=merger.merge,
            keep_below=0,
        )
        experts = [merger.skeletons[name].module for name in expert_names(plan)]
        with evaluating(experts), closing(walk.steps()) as steps:
            for number, _ in enumerate(steps, 1):
                if on_step is not None:
                    on_step("layers", min(number, walk.length), walk.length)
    head = Head(
        data=fingerprint(data.batches),
        samples=data.samples,
        batches=len(data.batches),
        mode=data.mode,
        coefficients=tuple(simplex([expert.coefficient for expert in plan.recipe.experts])),
        models=described(plan, plan.base),
        units=(),
        blocks=(),
        uncovered={},
        owners=tuple(data.owners),
        grams=merger.along,
        forward=f"{method.component_name()} {json.dumps(method.parameters())}",
    )
    return Calibration(head, frozenset(range(len(data.batches))), data.samples, merger.states)


class _Merger:
    """The models and the Gram matrices made so far."""

    def __init__(self, plan: Plan, data: Data, method: MergeMethod) -> None:
        self._plan, self._data, self._method = plan, data, method
        assert plan.base is not None
        self.skeletons = skeletons(plan, plan.base, data)
        self.skeletons.pop(BASE)
        self._experts = expert_names(plan)
        self._weights = {name: weights(self.skeletons[name].module) for name in self._experts}
        self._merged = dict(self.skeletons[MERGED].module.named_parameters())
        self._owners = data.owner_of(len(self._experts))
        self._done: set[str] = set()
        self.along: dict[str, int] = {}
        self.states: dict[str, State] = {}

    def merge(self, module: str, waiting: Mapping[int, Mapping[str, Call]]) -> None:
        """Merge the linear maps within a module by what its waiting calls are about to give it."""
        seen: dict[str, None] = {}
        for name in self._experts:
            self._run(name, module, waiting, seen)
        for place in seen:
            target = self._merged[f"{place}.weight"]
            target.data.copy_(self._solved(place))
            self._done.add(place)

    def _run(
        self,
        name: str,
        module: str,
        waiting: Mapping[int, Mapping[str, Call]],
        seen: dict[str, None],
    ) -> None:
        """Run an expert's module on the merged model's inputs, those of its own batches."""
        skeleton, statistic = self.skeletons[name], ActivationGram()
        skeleton.load((module,))
        for index, calls in waiting.items():
            batch = self._data.batches[index]
            if self._owners.get(id(batch), name) != name:
                continue

            def see(call: MapCall, batch: Batch = batch) -> None:
                place = call.parameter.removesuffix(".weight")
                if place in self._done:
                    raise ModelError(
                        f"{place} is run more than once in a forward pass, so it cannot be merged "
                        "on the way; use regmean."
                    )
                keep = None if call.window is not None else kept(batch, call.inputs)
                inputs = LayerInputs(call.inputs, keep=keep, window=call.window, single=call.single)
                key = f"gram/{place}/{name}"
                self.states[key] = statistic.update(self.states.get(key, {}), inputs)
                self.along[place] = call.along
                seen[place] = None

            request = calls[MERGED]
            part = skeleton.module.get_submodule(module)
            with Fetching(skeleton, skeleton.keep), WatchingMaps(self._weights[name], see):
                part(*request.args, **request.kwargs)
        skeleton.drop((module,))

    def _solved(self, place: str) -> Tensor:
        """Return a map's weight as the merge will make it, in its stored dtype."""
        plan = self._plan
        name = parameter_name(f"{place}.weight", plan.reference)
        if name is None or name not in plan.tasks:
            raise ModelError(f"{plan.reference.path} lacks {place}.weight; add it to the file.")
        dtype = compute_dtype([model.spec(name).dtype for model in plan.inputs])
        task = plan.tasks[name]
        found = [self.states.get(f"gram/{place}/{expert}") for expert in self._experts]
        like = next(state["gram"] for state in found if state is not None)
        grams = [torch.zeros_like(like) if state is None else state["gram"] for state in found]
        stacked = torch.stack(grams)
        counts = [0.0 if state is None else float(state["count"]) for state in found]
        group = TensorGroup(
            name=name,
            experts=tuple(expert[name].to(dtype) for expert in plan.experts),
            coefficients=torch.tensor(task.coefficients, dtype=dtype),
            base=None if plan.base is None else plan.base[name].to(dtype),
            seed=plan.recipe.seed,
            calibration={
                "gram": stacked if stacked.dim() == 4 else stacked[:, None],
                "gram_rows": torch.tensor(counts, dtype=torch.float64),
                "gram_along": torch.tensor(self.along[place]),
            },
        )
        return self._method.merge(group).to(task.spec.dtype)
