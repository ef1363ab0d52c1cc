"""What models make of a task's inputs and tests: captured once for each model, kept, used often.

Shapes: N samples, D features, C classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from family import Family, Runner
from torch import Tensor

from mergewell.prediction.look import Seen, look

KEPT = 3000
"""Captures that are kept, those used longest ago go first."""


class Eye:
    """Runs models and remembers what came out, by the model's name and the task."""

    def __init__(self, family: Family) -> None:
        self.of, self.runner = family, Runner(family)
        self._known: OrderedDict[tuple[str, str, str], Any] = OrderedDict()
        self._inside = ""

    def inputs(self, model: str, task: str, load: Callable[[], Mapping[str, Tensor]]) -> Seen:
        """Return what a model makes of a task's inputs; `load` gives its weights if need be."""
        return self._remembered(
            ("inputs", model, task),
            load,
            lambda: look(self.runner.module, self.of.inputs(task).batches),
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
