"""Collect: one walk of the base, the experts and the merged model gathers every statistic.

Shapes: K experts; P = K + 2 models; N samples, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from mergewell.calibration.data import Data, Memory, digest, fingerprint
from mergewell.calibration.result import FAMILIES, Calibration, Head, Model
from mergewell.engines.base import one_thread_a_worker
from mergewell.errors import DataError, RecipeError
from mergewell.models.capture import Averages, observing
from mergewell.models.dataflow import Batch, parts, tensors
from mergewell.models.own_path import OwnPaths
from mergewell.models.skeleton import Read, Skeleton, without_weights
from mergewell.models.spill import Spill
from mergewell.models.trace import Trace, trace
from mergewell.models.units import Unit, checked_kinds
from mergewell.models.walk import Step, Walk
from mergewell.plan import Plan
from mergewell.run import merge_tensors
from mergewell.statistics.activation import BlockOutputs
from mergewell.statistics.activation_drift import Sides
from mergewell.statistics.activation_features import SampleFeatures
from mergewell.statistics.activation_gram import LayerInputs
from mergewell.statistics.base import State
from mergewell.storage.base import Checkpoint

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it and what there is to do."""

BASE, MERGED, MEAN = "base", "merged", "mean"

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
    first, count = shard
    indices = range(first, len(data.batches), count)
    if not indices:
        raise DataError(
            f"Shard {first}/{count} gets none of the {len(data.batches)} batches of the data; use "
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
    return collector.result(frozenset(indices))


class _Collector:
    """The models of a plan and the states of all statistics."""

    def __init__(self, plan: Plan, base: Checkpoint, data: Data) -> None:
        self._plan, self._base, self._data = plan, base, data
        self._shares = simplex([expert.coefficient for expert in plan.recipe.experts])
        self._experts = [f"expert {number}" for number in range(1, len(plan.experts) + 1)]
        self.skeletons = self._built()
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
        self._own = OwnPaths(self._experts, MERGED, self._shares, self._m_loss)
        self._averages: tuple[str, Averages] | None = None
        self._has_blocks = False
        sizes = [len(next(iter(tensors(batch)))) for batch in data.batches]
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
        reached = [u for u in self._units if any(_within(u.module, name) for name in names)]
        for unit in self._units:
            if unit not in reached:
                self._uncovered[unit.name] = "holds several blocks, which are run one by one"
                self._m_loss.pop(unit.name)
        self._units = tuple(reached)

    @contextmanager
    def around(self, model: str, module: str, batch: Batch) -> Generator[None]:
        """Observe what a model does while one of its modules is called."""
        units = [unit for unit in self._units if _within(unit.module, module)]
        with ExitStack() as stack:
            if self._data.mode == "own":
                if model in (*self._experts, MERGED):
                    own = self.skeletons[model].module
                    stack.enter_context(self._own.watching(model, own, units))
            elif model == self._reference:
                stack.enter_context(self._observing(module, units, batch))
            if self._data.gram and model in self._experts:
                stack.enter_context(self._gathering(model, module, batch))
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
            units = [unit for unit in self._units if _within(unit.module, step.module)]
            self._own.compare(units, step.batch)
        if step.is_block:
            node_dim = _node_dim(self.skeletons[BASE].module.get_submodule(step.module), outputs[0])
            self._see_block(step.module, step.visit, outputs, number, node_dim)

    def result(self, done: frozenset[int]) -> Calibration:
        """Return everything."""
        m_loss = {f"m_loss/{name}": state for name, state in self._m_loss.items() if state}
        head = Head(
            data=fingerprint(self._data.batches),
            samples=self._data.samples,
            batches=len(self._data.batches),
            mode=self._data.mode,
            coefficients=tuple(self._shares),
            models=self._models(),
            units=tuple(unit for unit in self._units if f"m_loss/{unit.name}" in m_loss),
            blocks=tuple(self._blocks),
            uncovered=self._uncovered,
        )
        seen = sum(self._sizes[number] for number in done)
        return Calibration(head, done, seen, {**m_loss, **self._states})

    def _built(self) -> dict[str, Skeleton]:
        base, experts, merged = self._base, self._plan.experts, self._plan
        prototype = without_weights(self._data.factory)
        made = {BASE: Skeleton(prototype, base.specs, _reading(base))}
        for name, expert in zip(self._experts, experts, strict=True):
            made[name] = Skeleton(prototype, expert.specs, _reading(expert))
        specs = {task.name: task.spec for task in merged.tasks.values()}
        made[MERGED] = Skeleton(prototype, specs, lambda n: merge_tensors(merged, n))
        if self._data.mode == "mean":
            made[MEAN] = Skeleton(prototype, base.specs, _averaging(experts))
        return made

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

    @contextmanager
    def _gathering(self, model: str, module: str, batch: Batch) -> Generator[None]:
        """Add the inputs of all linear layers within a module to their Gram matrices."""
        part = self.skeletons[model].module.get_submodule(module)
        with ExitStack() as hooks:
            for name, layer in parts(part):
                if isinstance(layer, nn.Linear):
                    place = ".".join(filter(None, (module, name)))

                    def hook(
                        _layer: nn.Module, args: Any, key: str = f"gram/{place}/{model}"
                    ) -> None:
                        self._add(key, LayerInputs(args[0], keep=kept(batch, args[0])))

                    hooks.callback(layer.register_forward_pre_hook(hook).remove)
            yield

    def _see_end(self, outputs: Sequence[Any], number: int) -> None:
        first = [_first(output) for output in outputs]
        self._add("output/", Sides(first, self._shares))
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
        self._add(f"cka/{place}", laid)
        self._add(f"drift/{place}", Sides(laid.rows, self._shares))
        self._add(f"features/{place}", SampleFeatures(laid.pooled, start))

    def _add(self, key: str, batch: Any) -> None:
        statistic = FAMILIES[key.partition("/")[0]]
        self._states[key] = statistic.update(self._states.get(key, statistic.start()), batch)

    def _models(self) -> tuple[Model, ...]:
        checkpoints = [self._base, *self._plan.experts]
        models = [
            Model(name, str(checkpoint.path), digest(checkpoint))
            for name, checkpoint in zip([BASE, *self._experts], checkpoints, strict=True)
        ]
        return (*models, Model(MERGED, "", merge_digest(self._plan)))


def require_same(plan: Plan, calibration: Calibration) -> None:
    """Require that a calibration is of the models and the merge of a plan.

    Raises:
        DataError: it is of others.
    """
    base = plan.base if plan.base is not None else plan.reference
    found = [digest(checkpoint) for checkpoint in (base, *plan.experts)]
    known = [model.digest for model in calibration.head.models]
    paths = [str(checkpoint.path) for checkpoint in (base, *plan.experts)]
    if len(known) != len(found) + 1:
        raise DataError(
            f"The calibration is of {len(known) - 2} experts and {len(plan.experts)} are named; "
            "name those that it was made with."
        )
    for path, model, own in zip(paths, calibration.head.models, found, strict=False):
        if model.digest != own:
            raise DataError(
                f"{path} is not the {model.name} that the calibration was made with "
                f"({model.path}); name that one or calibrate again."
            )
    if known[-1] != merge_digest(plan):
        raise DataError(
            "The calibration was made with another method, other settings or coefficients than "
            "are named; name the same or calibrate again."
        )


def merge_digest(plan: Plan) -> str:
    """Return a hash of what a plan does, whatever its models are and wherever they lie."""
    recipe = plan.recipe.model_dump(mode="json", exclude={"base", "notes", "shard_bytes"})
    recipe["method"] = {"name": plan.recipe.method.name}
    recipe["method"] |= plan.recipe.method.build().parameters()
    for expert in recipe["experts"]:
        del expert["path"]
    text = json.dumps(recipe, sort_keys=True)
    return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def simplex(coefficients: Sequence[float]) -> list[float]:
    """Return the coefficients divided by their sum; equal ones where they cannot be."""
    if min(coefficients) < 0 or sum(coefficients) <= 0:
        return [1 / len(coefficients)] * len(coefficients)
    return [coefficient / sum(coefficients) for coefficient in coefficients]


def first_samples(batches: Sequence[Batch], count: int = 2) -> Batch:
    """Return the first samples of the first batch, enough to trace a module."""
    first = batches[0]
    if isinstance(first, Tensor):
        return first[:count]
    return {name: tensor[:count] for name, tensor in first.items()}


def kept(batch: Batch, hidden: Tensor) -> Tensor | None:
    """Return which tokens of [N, T, D] are no padding, [N, T], if the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or hidden.shape[:-1] != mask.shape:
        return None
    return mask.to(torch.bool)


def _reading(checkpoint: Checkpoint) -> Read:
    def read(names: tuple[str, ...]) -> Iterable[tuple[str, Tensor]]:
        return ((name, checkpoint[name]) for name in names)

    return read


def _averaging(experts: Sequence[Checkpoint]) -> Read:
    def read(names: tuple[str, ...]) -> Iterable[tuple[str, Tensor]]:
        for name in names:
            first = experts[0][name]
            if not first.is_floating_point():
                yield name, first
                continue
            total = first.to(torch.float64)
            for expert in experts[1:]:
                total = total + expert[name].to(torch.float64)
            yield name, total / len(experts)

    return read


def _within(module: str, whole: str) -> bool:
    return module == whole or not whole or module.startswith(f"{whole}.")


def _node_dim(block: nn.Module, output: object) -> int:
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
