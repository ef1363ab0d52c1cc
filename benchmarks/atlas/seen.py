"""What models make of a task's inputs and tests: captured once for each model, kept, used often.

Shapes: N samples, D features, C classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from family import Family, Part, Runner
from torch import Tensor, nn

from mergewell.calibration.collect import _node_dim  # the same layout as the calibration's
from mergewell.calibration.data import kept
from mergewell.models.barrier import first_output
from mergewell.models.cut import cut
from mergewell.models.dataflow import evaluating, tensors
from mergewell.statistics.activation import BlockOutputs

KEPT = 3000
"""Captures that are kept, those used longest ago go first."""


@dataclass(frozen=True)
class Seen:
    """What one model made of one task's unlabelled inputs."""

    outputs: Tensor
    """[N, D]"""
    blocks: Mapping[str, Tensor]
    """Pooled features of each block, [N, D], in forward order."""


class Eye:
    """Runs models and remembers what came out, by the model's name and the task."""

    def __init__(self, family: Family) -> None:
        self.of, self.runner = family, Runner(family)
        self._known: OrderedDict[tuple[str, str, str], Any] = OrderedDict()
        self._inside = ""

    def inputs(self, model: str, task: str, load: Callable[[], Mapping[str, Tensor]]) -> Seen:
        """Return what a model makes of a task's inputs; `load` gives its weights if need be."""
        return self._remembered(
            ("inputs", model, task), load, lambda: look(self.runner.module, self.of.inputs(task))
        )

    def test(self, model: str, task: str, load: Callable[[], Mapping[str, Tensor]]) -> Tensor:
        """Return a model's outputs on a task's tests, [N, D]."""
        return self._remembered(
            ("test", model, task), load, lambda: self.runner.features(self.of.test(task))
        )

    def merged(self, state: Mapping[str, Tensor]) -> Runner:
        """Return the runner with these weights, which nobody remembers."""
        self._inside = ""
        self.runner.put(state)
        return self.runner

    def _remembered(
        self, key: tuple[str, str, str], load: Callable[[], Any], see: Callable[[], Any]
    ) -> Any:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if self._inside != key[1]:
            self.runner.put(load())
            self._inside = key[1]
        self._known[key] = see()
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        return self._known[key]


def look(module: nn.Module, part: Part) -> Seen:
    """Return what a module makes of some inputs: pooled as `calibrate` pools them."""
    names = [piece.modules[0] for piece in cut(module) if piece.is_block]
    found: dict[str, list[Tensor]] = {}
    outputs: list[Tensor] = []
    for batch in part.batches:
        with ExitStack() as hooks:
            for name in names:

                def hook(
                    block: nn.Module, _: Any, output: Any, name: str = name, batch: Any = batch
                ) -> None:
                    value = tensors(output)[0]
                    dim = _node_dim(block, value)
                    keep = kept(batch, value) if dim == -1 else None
                    laid = BlockOutputs.of([value], node_dim=dim, keep=keep)
                    found.setdefault(name, []).append(laid.pooled[0])

                hooks.callback(module.get_submodule(name).register_forward_hook(hook).remove)
            hooks.enter_context(evaluating([module]))
            hooks.enter_context(torch.no_grad())
            outputs.append(first_output(module, batch).float())
    blocks = {name: torch.cat(parts) for name, parts in found.items()}
    return Seen(torch.cat(outputs), blocks or {"(output)": torch.cat(outputs)})
