"""Own path: M-Loss between models that are each run by themselves, unit by unit."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from mergewell.models.dataflow import Batch
from mergewell.models.observe import add_pointwise, add_whole, completed, counting
from mergewell.models.units import Unit
from mergewell.statistics.base import State
from mergewell.statistics.m_loss import Factors


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
        self._pointwise: dict[tuple[str, str], Factors] = {}
        self._whole: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}

    @contextmanager
    def watching(self, name: str, model: nn.Module, units: Sequence[Unit]) -> Generator[None]:
        """While open, keep what a model's units give when they are called."""

        def watch(unit: Unit, heads: list[Tensor]) -> Any:
            def hook(_part: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
                # copies: what comes after may overwrite the output
                if unit.branches:
                    made = completed(unit, model, args, kwargs, output)
                    self._pointwise[name, unit.name] = tuple(part.clone() for part in made)
                else:
                    own = heads.pop() if heads else None
                    self._whole[name, unit.name] = (unit.first(output).clone(), own)

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
            yield

    def compare(self, units: Sequence[Unit], batch: Batch) -> None:
        """Add one batch of some units, which all models must have called."""
        for unit in units:
            of_models = [(name, unit.name) for name in self._models]
            if unit.branches:
                *z, merged = (self._pointwise.pop(key) for key in of_models)
                keep = counting(batch, unit.node_dim, merged[0])
                add_pointwise(self._states, unit, z, merged, self._coefficients, keep)
            else:
                *seen, middle = (self._whole.pop(key) for key in of_models)
                add_whole(self._states, unit, seen, middle, self._coefficients, batch)
