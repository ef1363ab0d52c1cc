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

from mergewell.models.dataflow import Batch, call
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
        mask = self.batch.get("attention_mask") if isinstance(self.batch, Mapping) else None
        keep = _kept(mask, unit.node_dim, output)
        for start in range(0, len(output), size):
            some = slice(start, start + size)
            given = (args[0][some],) if alone else args
            z = [unit.pre_activations(expert, given, kwargs) for expert in self.experts]
            merged = None
            if self.merged is self.reference:
                merged = _completed(unit, self.reference, given, kwargs, output[some])
            elif self.merged is not None:
                merged = unit.pre_activations(self.merged, given, kwargs)
            kept = None if keep is None else keep[some]
            _update(self.states, unit, z, merged, self.coefficients, kept)

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
        _update_whole(self.states, unit, seen, merged, self.coefficients, self.batch)


def _completed(
    unit: Unit, model: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> tuple[Tensor, ...]:
    """Return all branches' pre-activations, given what the first branch's layer returned."""
    made = {unit.branches[0].layer: output}
    for branch in unit.branches:
        if branch.layer not in made:
            made[branch.layer] = model.get_submodule(branch.layer)(*args, **kwargs)
    return unit.split(model, made)


def observe_own(
    reference: nn.Module,
    experts: Sequence[nn.Module],
    units: Sequence[Unit],
    batch: Batch,
    coefficients: Sequence[float],
    states: dict[str, State],
) -> None:
    """Run every model on its own path, then compare unit by unit."""
    seen = [_own(model, units, batch) for model in (*experts, reference)]
    for unit in units:
        if unit.branches:
            *z, merged = [by_unit[0].pop(unit.name) for by_unit in seen]
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            _update(states, unit, z, merged, coefficients, _kept(mask, unit.node_dim, z[0][0]))
        else:
            *outputs, own = [by_unit[1].pop(unit.name) for by_unit in seen]
            _update_whole(states, unit, outputs, own, coefficients, batch)


def _own(
    model: nn.Module, units: Sequence[Unit], batch: Batch
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, tuple[Tensor, Tensor | None]]]:
    """Return pre-activations and module outputs of one model on its own path, by unit."""
    pointwise: dict[str, tuple[Tensor, ...]] = {}
    whole: dict[str, tuple[Tensor, Tensor | None]] = {}

    def watch(unit: Unit, heads: list[Tensor]) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            # copies: what comes after may overwrite the output
            if unit.branches:
                z = _completed(unit, model, args, kwargs, output)
                pointwise[unit.name] = tuple(part.clone() for part in z)
            else:
                whole[unit.name] = (unit.first(output).clone(), heads[-1] if heads else None)

        return hook

    with ExitStack() as hooks:
        for unit in units:
            heads: list[Tensor] = []
            handle = unit.watch_heads(model, heads)
            if handle is not None:
                hooks.callback(handle.remove)
            module = model.get_submodule(unit.module)
            handle = module.register_forward_hook(watch(unit, heads), with_kwargs=True)
            hooks.callback(handle.remove)
        call(model, batch)
    return pointwise, whole


def _update(
    states: dict[str, State],
    unit: Unit,
    z: Sequence[tuple[Tensor, ...]],
    merged: tuple[Tensor, ...] | None,
    coefficients: Sequence[float],
    keep: Tensor | None,
) -> None:
    observed = ActivationBatch(z, coefficients, unit.function, unit.node_dim, merged, keep)
    states[unit.name] = MLoss().update(states[unit.name], observed)


def _update_whole(
    states: dict[str, State],
    unit: Unit,
    seen: Sequence[tuple[Tensor, Tensor | None]],
    merged: tuple[Tensor, Tensor | None],
    coefficients: Sequence[float],
    batch: Batch,
) -> None:
    """Add the modules' outputs and, under their own keys, the heads' values."""
    old = states[unit.name]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    new: dict[str, Tensor] = {}
    for index, (prefix, dim) in enumerate((("", unit.node_dim), (HEADS, -1))):
        sides = [part for side in (*seen, merged) if (part := side[index]) is not None]
        if len(sides) != len(seen) + 1:
            continue
        *outputs, middle = sides
        keep = _kept(mask, dim, outputs[0])
        observed = ActivationBatch(outputs, coefficients, identity, dim, middle, keep)
        update = MLoss(moments=False).update(part_of(old, prefix), observed)
        new |= {prefix + key: part for key, part in update.items()}
    states[unit.name] = new


def part_of(state: State, prefix: str) -> State:
    """Return the part of a state whose keys begin with a prefix, without it."""
    if prefix:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {key: part for key, part in state.items() if not key.startswith(HEADS)}


def _kept(mask: Tensor | None, node_dim: int, z: Tensor) -> Tensor | None:
    """Return a mask of padding if it has a place for each of the observations."""
    if mask is None or node_dim != -1 or z.shape[:-1] != mask.shape:
        return None
    return mask.to(torch.bool)
