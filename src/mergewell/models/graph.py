"""Graph: a recording of one forward pass, ready for questions about who feeds whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mergewell.errors import ModelError
from mergewell.models.activation import Activation, Slot, Step
from mergewell.models.dataflow import Op, Recorder, Value, geometry

MATRIX_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
WEIGHT_OPS = MATRIX_PRODUCTS | {"convolution"}
SAME_ORDER = frozenset(
    {"view", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze", "alias", "detach"}
)
"""Views after which the nodes are still where the linear map put them."""
_POINTWISE_TOO = frozenset({"_to_copy", "hardswish", "zeros_like", "ones_like", "full_like"})
"""Pointwise operations that torch does not tag as such."""


class Uncovered(Exception):  # noqa: N818 - a reason, not an error
    """Carries why a layer is not covered."""


@dataclass(slots=True)
class Region:
    """The pointwise functions of one value, with what each is made from."""

    origin: dict[Value, Value]
    """Each member's value before views, which pointwise functions pass through."""
    layout: dict[Value, tuple[object, ...]]
    """The views that each member went through."""
    parents: dict[Value, list[Value]]


class Graph:
    """Operations and values of a recorded forward pass."""

    def __init__(self, module: nn.Module, recorder: Recorder, results: Sequence[Tensor]) -> None:
        """Read a recording; `results` are the tensors that the module returned.

        Raises:
            ModelError: none of them depends on the module's input.
        """
        self.module = module
        self.recorder = recorder
        self.results = [value for value in map(recorder.read, results) if value.is_data]
        if not self.results:
            raise ModelError(
                f"{type(module).__name__} returned no tensor that depends on its input: pass it "
                "the inputs that its forward pass uses."
            )
        self.order = {op: index for index, op in enumerate(recorder.ops)}
        live = self._live()
        self.consumers: dict[Value, list[Op]] = {}
        for op in recorder.ops:
            for value in set(op.inputs) if op in live else ():
                self.consumers.setdefault(value, []).append(op)

    def _live(self) -> set[Op]:
        """Return the operations that the module's results depend on."""
        live: set[Op] = set()
        queue = [value.producer for value in self.results]
        while queue:
            op = queue.pop()
            if op is not None and op not in live:
                live.add(op)
                queue.extend(value.producer for value in op.inputs)
        return live

    def region(self, start: Value) -> tuple[Region, dict[Value, list[Op]]]:
        """Return the pointwise region of `start`, and who consumes its members outside it."""
        region = Region({start: start}, {start: ()}, {})
        outside: dict[Value, list[Op]] = {}
        queue = [(self.order[op], op) for op in self.consumers.get(start, [])]
        heapify(queue)  # in the order of time, so that inputs come first
        seen: set[Op] = set()
        while queue:
            _, op = heappop(queue)
            if op in seen:
                continue
            seen.add(op)
            inside = [value for value in op.inputs if value in region.origin]
            layout = {region.layout[value] for value in inside}
            alone = len(inside) == len(op.inputs) and len(op.outputs) == 1 and len(layout) == 1
            if alone and op.is_view:
                made, source = op.outputs[0], region.origin[inside[0]]
                same = geometry(made.tensor) == geometry(inside[0].tensor)
                moved = () if same else ((op.name, repr(op.args[1:])),)
                region.layout[made] = region.layout[inside[0]] + moved
            elif alone and _is_pointwise(op):
                made = source = op.outputs[0]
                region.layout[made] = layout.pop()
            else:
                for value in inside:
                    outside.setdefault(value, []).append(op)
                continue
            region.origin[made] = source
            region.parents[made] = inside
            for consumer in self.consumers.get(made, []):
                heappush(queue, (self.order[consumer], consumer))
        return region, outside


def replayed(region: Region, start: Value, end: Value) -> Activation:
    """Return the recorded operations from `start` to `end` as a function."""
    slots = {start: 0}
    steps: list[Step] = []

    def add(value: Value) -> None:
        if value in slots or value.producer is None:
            return
        for source in (region.origin[held] for held in value.producer.inputs):
            add(source)

        def slot(held: Value) -> Slot:
            return Slot(slots[region.origin[held]])

        op = value.producer
        args, kwargs = tree_map_only(Value, slot, (op.args, op.kwargs))
        steps.append(Step(str(op.function), args, kwargs))
        slots[value] = len(steps)

    add(region.origin[end])
    return Activation("custom", tuple(steps))


def _is_pointwise(op: Op) -> bool:
    tags = op.function.tags if op.function is not None else ()
    random = torch.Tag.nondeterministic_seeded in tags
    tagged = torch.Tag.pointwise in tags or op.name in _POINTWISE_TOO
    return tagged and not random and "out" not in op.kwargs
