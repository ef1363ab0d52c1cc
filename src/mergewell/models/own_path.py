"""Own path: M-Loss between models that are each run by themselves, unit by unit.

Shapes: K experts, N samples, O nodes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.models.dataflow import Batch
from mergewell.models.units import Unit
from mergewell.statistics.base import State
from mergewell.statistics.m_loss import ActivationBatch, Factors, MLoss, identity


class OwnPaths:
    """Keeps what every model's units gave for one batch until all models are through."""

    def __init__(
        self,
        experts: Sequence[str],
        merged: str,
        coefficients: Sequence[float],
        states: dict[str, State],
    ) -> None:
        """Compare the experts' mean with the merged model; all are known by their names.

        `states` are updated unit by unit.
        """
        self._models = [*experts, merged]
        self._coefficients, self._states = coefficients, states
        self._seen: dict[tuple[str, str], Tensor | Factors] = {}

    @contextmanager
    def watching(self, name: str, model: nn.Module, units: Sequence[Unit]) -> Generator[None]:
        """While open, keep what a model's units give when they are called."""

        def watch(unit: Unit) -> Any:
            def hook(_part: nn.Module, args: Any, kwargs: Any, output: object) -> None:
                # copies: what comes after may overwrite the output
                if unit.branches:
                    made = self._made(unit, model, args, kwargs, output)
                    self._seen[name, unit.name] = tuple(part.clone() for part in made)
                else:
                    self._seen[name, unit.name] = unit.first(output).clone()

            return hook

        with ExitStack() as hooks:
            for unit in units:
                module = model.get_submodule(unit.module)
                handle = module.register_forward_hook(watch(unit), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def compare(self, units: Sequence[Unit], batch: Batch) -> None:
        """Add one batch of some units, which all models must have called."""
        for unit in units:
            *experts, merged = (self._seen.pop((name, unit.name)) for name in self._models)
            first = experts[0] if isinstance(experts[0], Tensor) else experts[0][0]
            observed = ActivationBatch(
                experts,
                self._coefficients,
                unit.function if unit.branches else identity,
                node_dim=unit.node_dim,
                merged=merged,
                keep=_kept(batch, unit, first),
            )
            statistic = MLoss() if unit.branches else MLoss(moments=False)
            self._states[unit.name] = statistic.update(self._states[unit.name], observed)

    def _made(
        self, unit: Unit, model: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> tuple[Tensor, ...]:
        """Return the branches' pre-activations; the first one's layer has just been run."""
        made = {unit.branches[0].layer: output}
        for branch in unit.branches:
            if branch.layer not in made:
                made[branch.layer] = model.get_submodule(branch.layer)(*args, **kwargs)
        return unit.split(model, made)


def _kept(batch: Batch, unit: Unit, given: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or unit.node_dim != -1 or given.shape[:-1] != mask.shape:
        return None
    return mask.to(torch.bool)
