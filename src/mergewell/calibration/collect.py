"""Collect: one walk of the base, the experts and the merged model gathers every statistic.

Shapes: K experts; P = K + 2 models; N samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from mergewell.calibration.data import Data, Memory, fingerprint, first_samples, kept
from mergewell.calibration.fisher import gather_fisher
from mergewell.calibration.models import (
    BASE,
    MEAN,
    MERGED,
    described,
    expert_names,
    simplex,
    skeletons,
)
from mergewell.calibration.result import FAMILIES, Calibration, Head
from mergewell.engines.base import one_thread_a_worker
from mergewell.errors import DataError, RecipeError
from mergewell.models.dataflow import Batch, parts, tensors
from mergewell.models.fisher import Likelihood
from mergewell.models.maps import MapCall, WatchingMaps, weights
from mergewell.models.observe import Averages, observing
from mergewell.models.own_path import OwnPaths
from mergewell.models.spill import Spill
from mergewell.models.trace import Trace, trace
from mergewell.models.units import Unit, checked_kinds
from mergewell.models.walk import Step, Walk
from mergewell.plan import Plan
from mergewell.statistics.activation import BlockOutputs
from mergewell.statistics.activation_drift import Sides
from mergewell.statistics.activation_features import SampleFeatures
from mergewell.statistics.activation_gram import LayerInputs
from mergewell.statistics.base import State
from mergewell.statistics.m_loss import ActivationBatch, MLoss, identity
from mergewell.storage.base import Checkpoint

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it and what there is to do."""

WIDEST = 1 << 14
"""Numbers a sample up to which a model's output is kept whole: features, or logits of classes."""


def calibrate(
    plan: Plan,
    data: Data,
    *,
    shard: tuple[int, int] = (0, 1),
    memory: Memory | None = None,
    on_step: OnStep | None = None,
) -> Calibration:
    """Run base, experts and merged model over the data, block by block, and return what was seen.

    With `shard` (i, n) only batches i, i + n, ... are run; `Calibration.join` puts the shards
    together. The plan says what "merged" means. Models that are larger than memory are read piece
    by piece; see `Memory` and `models.walk`.

    Raises:
        RecipeError: the plan has no base, or a shard that is none.
        DataError: no batch falls to the shard, or activations are not finite.
        UserError: checkpoints, models or data that do not fit one another.
    """
    if plan.base is None:
        raise RecipeError("A calibration compares experts with their base; name it with --base.")
    first, shards = shard
    indices = range(first, len(data.batches), shards)
    if not indices:
        raise DataError(
            f"Shard {first}/{shards} gets none of the {len(data.batches)} batches of the data; use "
            "fewer shards or more data."
        )
    limits = memory or Memory()
    with one_thread_a_worker(), Spill(limits.activations, limits.folder) as spill:
        collector = _Collector(plan, plan.base, data)
        walk = Walk(
            collector.skeletons,
            [data.batches[index] for index in indices],
            spill=spill,
            around=collector.around,
            together=collector.together,
            keep_below=limits.weights,
        )
        collector.check_reach(walk)
        with closing(walk.steps()) as steps:
            for number, step in enumerate(steps, 1):
                collector.see(step, indices[step.index])
                if on_step is not None:
                    on_step("activations", min(number, walk.length), walk.length)
        if on_step is not None:
            on_step("activations", walk.length, walk.length)
        if data.fisher is not None:
            collector.see_gradients(data.fisher, indices, on_step)
    return collector.result(frozenset(indices))


class _Collector:
    """The models of a plan and the states of all statistics."""

    def __init__(self, plan: Plan, base: Checkpoint, data: Data) -> None:
        self._plan, self._base, self._data = plan, base, data
        self._shares = simplex([expert.coefficient for expert in plan.recipe.experts])
        self._experts = expert_names(plan)
        self.skeletons = skeletons(plan, base, data)
        self._compared = [BASE, *self._experts, MERGED]
        with self.skeletons[BASE].filled() as module:
            self._trace: Trace = trace(module, first_samples(data.batches))
        self._units = self._trace.of(checked_kinds(data.kinds))
        self._uncovered = dict(self._trace.uncovered)
        for name in self.skeletons[BASE].loaded.left_out:
            self._uncovered[name] = "not a part of the module that was built from these weights"
        self._reference = {"pretrained": BASE, "mean": MEAN}.get(data.mode, MERGED)
        self._m_loss: dict[str, State] = {unit.name: {} for unit in self._units}
        self._states: dict[str, State] = {}
        self._blocks: dict[str, None] = {}
        self._grams: dict[str, int] = {}
        self._weights = {name: weights(self.skeletons[name].module) for name in self._experts}
        self._own = OwnPaths(self._experts, MERGED, self._shares, self._m_loss)
        self._averages: tuple[str, Averages] | None = None
        self._has_blocks = False
        self._owners = data.owner_of(len(self._experts))
        sizes = [data.samples_in(number) for number in range(len(data.batches))]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self._sizes = sizes

    @property
    def together(self) -> dict[str, list[str]]:
        """Modules that must be in memory with a unit's module."""
        return {
            unit.module: [n for b in unit.branches for n in (b.layer, b.batch_norm) if n]
            for unit in self._units
        }

    def check_reach(self, walk: Walk) -> None:
        """Leave out units that no piece holds whole, with the reason."""
        self._has_blocks = any(piece.is_block for piece in walk.pieces)
        names = [name for piece in walk.pieces for name in piece.modules]
        reached = [
            unit
            for unit in self._units
            if unit.kind == "output" or any(_within(unit.module, name) for name in names)
        ]
        for unit in self._units:
            if unit not in reached:
                self._uncovered[unit.name] = "holds several blocks, which are run one by one"
                self._m_loss.pop(unit.name)
        self._units = tuple(reached)

    @contextmanager
    def around(self, model: str, module: str, batch: Batch) -> Generator[None]:
        """Observe what a model does while one of its modules is called."""
        units = self._units_in(module)
        with ExitStack() as stack:
            if self._data.mode == "own":
                if model in (*self._experts, MERGED):
                    own = self.skeletons[model].module
                    stack.enter_context(self._own.watching(model, own, units))
            elif model == self._reference:
                stack.enter_context(self._observing(module, units, batch))
            if self._data.gram and self._is_own(model, batch):
                stack.enter_context(self._gathering(model, batch))
            yield

    def see(self, step: Step, number: int) -> None:
        """Take note of what a module of every model returned for the batch of this number."""
        outputs = [step.outputs[name] for name in self._compared]
        if step.module is None:
            self._see_end(outputs, number)
            if not self._has_blocks:
                self._see_block("(output)", 1, outputs, number, -1)
            return
        if self._data.mode == "own":
            self._own.compare(self._units_in(step.module), step.batch)
        if step.is_block:
            dim = node_dim(self.skeletons[BASE].module.get_submodule(step.module), outputs[0])
            self._see_block(step.module, step.visit, outputs, number, dim)

    def see_gradients(
        self, likelihood: Likelihood, indices: Sequence[int], on_step: OnStep | None
    ) -> None:
        """Gather the Fisher information of the base, and of the experts on their own batches."""
        wanted = {BASE: list(indices)}
        for name in self._experts:
            wanted[name] = [n for n in indices if self._is_own(name, self._data.batches[n])]
        total, done = sum(len(numbers) for numbers in wanted.values()), count(1)

        def tell() -> None:
            if on_step is not None:
                on_step("gradients", next(done), total)

        self._states |= gather_fisher(
            self.skeletons, self._data, likelihood, wanted=wanted, starts=self._starts,
            on_batch=tell,
        )  # fmt: skip

    def result(self, done: frozenset[int]) -> Calibration:
        """Return everything."""
        m_loss = {f"m_loss/{name}": state for name, state in self._m_loss.items() if state}
        head = Head(
            data=fingerprint(self._data.batches),
            samples=self._data.samples,
            batches=len(self._data.batches),
            mode=self._data.mode,
            coefficients=tuple(self._shares),
            models=described(self._plan, self._base),
            units=tuple(unit for unit in self._units if f"m_loss/{unit.name}" in m_loss),
            blocks=tuple(self._blocks),
            uncovered=self._uncovered,
            owners=tuple(self._data.owners),
            grams=self._grams,
            fisher=self._data.fisher or "",
        )
        seen = sum(self._sizes[number] for number in done)
        return Calibration(head, done, seen, {**m_loss, **self._states})

    def _units_in(self, module: str) -> list[Unit]:
        """Return the units whose modules a module holds; the whole model's output is seen apart."""
        return [u for u in self._units if u.kind != "output" and _within(u.module, module)]

    def _observing(
        self, module: str, units: Sequence[Unit], batch: Batch
    ) -> AbstractContextManager[None]:
        if not units:
            return nullcontext()
        experts = [self.skeletons[name].module for name in self._experts]
        if self._averages is None or self._averages[0] != module:
            self._averages = (module, Averages(experts, self._shares))
        return observing(
            self.skeletons[self._reference].module,
            experts,
            units,
            batch,
            coefficients=self._shares,
            states=self._m_loss,
            merged=self.skeletons[MERGED].module if self._data.merged_layers else None,
            averages=self._averages[1],
        )

    def _is_own(self, model: str, batch: Batch) -> bool:
        """Return whether a model is an expert and a batch is of its task, or of all tasks."""
        return model in self._experts and self._owners.get(id(batch), model) == model

    def _gathering(self, model: str, batch: Batch) -> AbstractContextManager[object]:
        """Add the inputs of all linear maps that are called to their Gram matrices."""

        def see(call: MapCall) -> None:
            place = call.parameter.removesuffix(".weight")
            self._grams[place] = call.along
            keep = None if call.window is not None else kept(batch, call.inputs)
            inputs = LayerInputs(call.inputs, keep=keep, window=call.window, single=call.single)
            self._add(f"gram/{place}/{model}", inputs)

        return WatchingMaps(self._weights[model], see)

    def _see_end(self, outputs: Sequence[Any], number: int) -> None:
        first = [_first(output) for output in outputs]
        self._add("output/", Sides(first, self._shares))
        for unit in (unit for unit in self._units if unit.kind == "output"):
            _, *experts, merged = first
            keep = kept(self._data.batches[number], merged) if unit.node_dim == -1 else None
            observed = ActivationBatch(
                experts, self._shares, identity, unit.node_dim, merged=merged, keep=keep
            )
            state = self._m_loss[unit.name]
            self._m_loss[unit.name] = MLoss(moments=False).update(state, observed)
        if first[0].ndim == 2 and first[0].shape[1] <= WIDEST:
            self._add("outputs/", SampleFeatures(torch.stack(first), self._starts[number]))

    def _see_block(
        self, name: str, visit: int, outputs: Sequence[Any], number: int, node_dim: int
    ) -> None:
        place = name if visit == 1 else f"{name}#{visit}"
        if place in self._uncovered:
            return
        found = [tensors(output)[:1] for output in outputs]
        own = [tensor for part in found for tensor in part if tensor.is_floating_point()]
        size = self._sizes[number]
        if len(own) < len(outputs) or own[0].ndim < 2 or len(own[0]) != size:
            self._uncovered[place] = "a block whose output does not begin with the samples"
            return
        self._blocks[place] = None
        batch = self._data.batches[number]
        keep = kept(batch, own[0]) if node_dim == -1 else None
        start = self._starts[number]
        laid = BlockOutputs.of(own, node_dim=node_dim, keep=keep, start=start)
        self._add(f"moments/{place}", laid)
        self._add(f"drift/{place}", Sides(laid.rows, self._shares))
        self._add(f"features/{place}", SampleFeatures(laid.pooled, start))

    def _add(self, key: str, batch: Any) -> None:
        statistic = FAMILIES[key.partition("/")[0]]
        self._states[key] = statistic.update(self._states.get(key, statistic.start()), batch)


def _within(module: str, whole: str) -> bool:
    return module == whole or not whole or module.startswith(f"{whole}.")


def node_dim(block: nn.Module, output: object) -> int:
    """Return 1 where a block's output counts nodes like its convolutions do, else -1."""
    found = tensors(output)
    shape = found[0].shape if found else ()
    maps = [part for _, part in parts(block)]
    wide = {part.out_channels for part in maps if isinstance(part, _ConvNd)}
    flat = {part.out_features for part in maps if isinstance(part, nn.Linear)}
    return 1 if len(shape) > 2 and shape[1] in wide and shape[-1] not in flat else -1


def _first(output: object) -> Tensor:
    found = tensors(output)
    if not found:
        raise DataError("A model returns no tensor on the data; wrap it so that it does.")
    return found[0].float()
