"""Observing: while the reference runs, every expert's units are applied to the same hidden state.

Shapes: K experts, N samples, T tokens, O nodes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.models.dataflow import Batch
from mergewell.models.units import Unit
from mergewell.statistics.base import State
from mergewell.statistics.m_loss import ActivationBatch, MLoss, identity

_ELEMENTS = 786_432
"""Elements of a layer's output that are made and looked at together, to stay in the cache."""

HEADS = "heads:"
"""Begins the state's keys for the heads' values of an attention."""


@dataclass(slots=True)
class Averages:
    """Mean parameters of module units, made once and kept."""

    experts: Sequence[nn.Module]
    coefficients: Sequence[float]
    made: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])

    def of(self, unit: Unit) -> dict[str, Tensor]:
        """Return a unit's mean parameters and buffers, by their names inside its module."""
        if unit.name not in self.made:
            self.made[unit.name] = unit.averaged(self.experts, self.coefficients)
        return self.made[unit.name]


@contextmanager
def observing(
    reference: nn.Module,
    experts: Sequence[nn.Module],
    units: Sequence[Unit],
    batch: Batch,
    *,
    coefficients: Sequence[float],
    states: dict[str, State],
    merged: nn.Module | None = None,
    final: nn.Module | None = None,
    averages: Averages | None = None,
) -> Generator[None, None, None]:
    """While open, every forward pass of the reference observes its units on its own h.

    Whoever runs the reference, or one block of it, thereby updates `states[unit.name]` by all
    experts' contributions on the same h. Of the experts only the modules of the units are touched,
    so the rest may be on the meta device. The merged side is the mean of the pre-activations (of
    module units: the module with mean parameters, taken from `averages` or made here), or what
    `merged` makes of h; if `merged` is the reference, its own pass is used again. `final` is the
    same for the unit `output` alone. `batch` is looked at for its `attention_mask` alone, and its
    samples must be those of the pass. Open `evaluating` around this.

    Raises:
        ModelError: a module unit returns no tensor.
        RecipeError, DataError: see `MLoss.update`.
    """
    means = averages or Averages(experts, coefficients)
    watcher = _Watcher(reference, experts, batch, coefficients, states, merged, final, means)
    with ExitStack() as hooks:
        for unit in units:
            for handle in watcher.handles(unit):
                hooks.callback(handle.remove)
        yield


@dataclass(slots=True)
class _Watcher:
    """The hooks of `observing`."""

    reference: nn.Module
    experts: Sequence[nn.Module]
    batch: Batch
    coefficients: Sequence[float]
    states: dict[str, State]
    merged: nn.Module | None
    final: nn.Module | None
    averages: Averages
    inside: bool = False
    """An expert may be the reference: its layers must not call the hook again."""

    def handles(self, unit: Unit) -> list[Any]:
        """Hook one unit of the reference; return the handles."""
        heads: list[Tensor] = []
        handles: list[Any] = []
        if self.merged is self.reference and unit.heads:
            handles.append(unit.watch_heads(self.reference, heads))

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            if self.inside:
                return
            self.inside = True
            own = heads[-1] if heads else None  # before the experts run through the same hook
            try:
                if unit.branches:
                    self._pointwise(unit, args, kwargs, output)
                else:
                    self._whole(unit, args, kwargs, output, own)
            finally:
                self.inside = False
                heads.clear()

        module = self.reference.get_submodule(unit.module)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _pointwise(self, unit: Unit, args: Any, kwargs: Any, output: Tensor) -> None:
        """Observe a pointwise unit, a few samples at a time where its input is but one tensor."""
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        size = max(1, _ELEMENTS // max(1, output[0].numel())) if alone else len(output)
        keep = counting(self.batch, unit.node_dim, output)
        packs = alone and keep is not None and not bool(keep.all())
        packs = packs and args[0].shape[:-1] == output.shape[:-1] and self._is_by_row(unit)
        if packs and keep is not None:
            self._packed(unit, args[0], output, keep, size)
            return
        for start in range(0, len(output), size):
            some = slice(start, start + size)
            given = (args[0][some],) if alone else args
            z, merged = self._made(unit, given, kwargs, output[some])
            kept = None if keep is None else keep[some]
            add_pointwise(self.states, unit, z, merged, self.coefficients, kept)

    def _packed(self, unit: Unit, hidden: Tensor, output: Tensor, keep: Tensor, size: int) -> None:
        """Observe tokens that are no padding: the layers are run on these alone.

        At least `size` samples at a time, and more while that is little.
        """
        counts = [int(count) for count in keep.sum(1)]
        rows = max(1, _ELEMENTS // output.shape[-1])
        first = 0
        while first < len(counts):
            last = first + size
            while last < len(counts) and sum(counts[first : last + size]) <= rows:
                last += size
            kept = keep[first:last]
            own = output[first:last][kept] if self.merged is self.reference else output
            z, merged = self._made(unit, (hidden[first:last][kept],), {}, own)
            numbers = kept.nonzero()[:, 0]
            add_pointwise(self.states, unit, z, merged, self.coefficients, None, numbers)
            first = last

    def _made(
        self, unit: Unit, args: tuple[Any, ...], kwargs: Any, output: Tensor
    ) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        """Return every expert's pre-activations, and the merged ones if they are not their mean.

        `output` is what the first branch's layer of the reference made of the same input.
        """
        z = [unit.pre_activations(expert, args, kwargs) for expert in self.experts]
        merged = None
        if self.merged is self.reference:
            merged = completed(unit, self.reference, args, kwargs, output)
        elif self.merged is not None:
            merged = unit.pre_activations(self.merged, args, kwargs)
        return z, merged

    def _is_by_row(self, unit: Unit) -> bool:
        """Return whether a unit's layers are torch's own linear ones, which take rows one by one.

        Another module may do more to its input than its linear map, and gets it as it is.
        """
        models = [self.reference, *self.experts, *([self.merged] if self.merged else [])]
        return all(
            type(model.get_submodule(branch.layer)).forward is nn.Linear.forward
            and branch.batch_norm is None
            for model in models
            for branch in unit.branches
        )

    def _whole(
        self, unit: Unit, args: Any, kwargs: Any, output: object, heads: Tensor | None
    ) -> None:
        seen = [unit.run(expert, args, kwargs) for expert in self.experts]
        model = self.final if unit.kind == "output" and self.final is not None else self.merged
        if model is self.reference:
            merged = (unit.first(output), heads)
        elif model is not None:
            merged = unit.run(model, args, kwargs)
        else:
            merged = unit.run(self.experts[0], args, kwargs, state=self.averages.of(unit))
        add_whole(self.states, unit, seen, merged, self.coefficients, self.batch)


def completed(
    unit: Unit, model: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> tuple[Tensor, ...]:
    """Return all branches' pre-activations, given what the first branch's layer returned."""
    made = {unit.branches[0].layer: output}
    for branch in unit.branches:
        if branch.layer not in made:
            made[branch.layer] = model.get_submodule(branch.layer)(*args, **kwargs)
    return unit.split(model, made)


def add_pointwise(
    states: dict[str, State],
    unit: Unit,
    z: Sequence[tuple[Tensor, ...]],
    merged: tuple[Tensor, ...] | None,
    coefficients: Sequence[float],
    keep: Tensor | None,
    sample_of: Tensor | None = None,
) -> None:
    """Add a pointwise unit's pre-activations to its state."""
    observed = ActivationBatch(
        z, coefficients, unit.function, unit.node_dim, merged, keep, sample_of
    )
    states[unit.name] = MLoss().update(states[unit.name], observed)


def add_whole(
    states: dict[str, State],
    unit: Unit,
    seen: Sequence[tuple[Tensor, Tensor | None]],
    merged: tuple[Tensor, Tensor | None],
    coefficients: Sequence[float],
    batch: Batch,
) -> None:
    """Add a module unit's outputs to its state and, under their own keys, the heads' values."""
    old = states[unit.name]
    new: dict[str, Tensor] = {}
    for index, (prefix, dim) in enumerate((("", unit.node_dim), (HEADS, -1))):
        sides = [part for side in (*seen, merged) if (part := side[index]) is not None]
        if len(sides) != len(seen) + 1:
            continue
        *outputs, middle = sides
        keep = counting(batch, dim, outputs[0])
        observed = ActivationBatch(outputs, coefficients, identity, dim, middle, keep)
        update = MLoss(moments=False).update(part_of(old, prefix), observed)
        new |= {prefix + key: part for key, part in update.items()}
    states[unit.name] = new


def part_of(state: State, prefix: str) -> State:
    """Return the part of a state whose keys begin with a prefix, without it."""
    if prefix:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {key: part for key, part in state.items() if not key.startswith(HEADS)}


def counting(batch: Batch, node_dim: int, z: Tensor) -> Tensor | None:
    """Return which observations are no padding if the batch says so and has a place for each."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or node_dim != -1 or z.shape[:-1] != mask.shape:
        return None
    return mask.to(torch.bool)
