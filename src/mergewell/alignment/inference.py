"""Inference: the symbols of every tensor of a recorded forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mergewell.alignment.calls import Axes, Call, broadcast, is_pointwise, pointwise
from mergewell.alignment.rules_layout import LAYOUT
from mergewell.alignment.rules_maps import MAPS
from mergewell.alignment.symbols import Symbol, fix
from mergewell.models.dataflow import Batch, Op, Recorder, Value, call, evaluating, tensors
from mergewell.models.graph import Graph
from mergewell.models.hollow import filled

_RULES = {**LAYOUT, **MAPS}
_LOCAL = "meets a buffer that checkpoints do not hold"
_COMPUTED = "meets numbers that the model computes for itself"


class Inference:
    """What runs along the dimensions of a module's tensors, with the recording it was read from."""

    def __init__(self, module: nn.Module, batch: Batch) -> None:
        """Run the module once and read what every operation says.

        Raises:
            ModelError: the module returns no tensor that depends on its input.
        """
        self.axes: dict[Value, Axes] = {}
        self.seen: list[Axes] = []
        """Axes of every tensor, those that operations hold for a while included."""
        with evaluating([module]), filled(module):
            inputs = tree_map_only(
                Tensor,
                lambda tensor: tensor.clone(),
                batch if isinstance(batch, Tensor) else dict(batch),
            )
            held: dict[str, Tensor] = module.state_dict(keep_vars=True)
            self._held = {id(tensor) for tensor in held.values()}
            recorder = Recorder(module, tensors(inputs))
            with recorder.watching(module), recorder:
                result = call(module, inputs)
            self.graph = Graph(module, recorder, tensors(result))
            self._results = [recorder.read(tensor) for tensor in tensors(result)]
            self.live = _live(self._results)
            self._inputs = {recorder.read(tensor) for tensor in tensors(inputs)}
            self.states = {name: recorder.read(tensor) for name, tensor in held.items()}
            self._infer()

    def _infer(self) -> None:
        for op in self.graph.recorder.ops:
            if op in self.live:
                self._read(op)
        for value in self._results:
            for axis in self.known(value):
                fix(axis, "is the model's output")
        self.seen += self.axes.values()

    def known(self, value: Value) -> Axes:
        """Return the axes of a value; what no operation made is input, weight or constant."""
        if value not in self.axes:
            self.axes[value] = tuple(Symbol(size) for size in value.tensor.shape)
            for axis in self.axes[value]:
                if value in self._inputs:
                    fix(axis, "is the model's input")
                elif value.states and id(value.tensor) not in self._held:
                    fix(axis, _LOCAL)
                elif not value.states and not _is_uniform(value.tensor):
                    fix(axis, _COMPUTED)
        return self.axes[value]

    def _read(self, op: Op) -> None:
        """Let one operation say what it knows of its inputs, and note the axes of its outputs."""
        context = Call(op, _arguments(op), self.known)
        if op.function is None:  # another view of what was written in place
            known = [self.known(op.inputs[0])] if op.is_view else self._unknown(op)
        elif op.name in _RULES:
            known = _RULES[op.name](context)
        elif is_pointwise(op):
            known = pointwise(context)
        else:
            known = self._unknown(op)
        self.seen += context.hidden
        for index, value in enumerate(op.outputs):
            shape = tuple(value.tensor.shape)
            axes = known[index] if index < len(known) else None
            if axes is None:
                axes = broadcast([], shape)
            if tuple(axis.size for axis in axes) != shape:  # changed in place, by now or later
                axes = self._unknown(op)[index]
            self.axes[value] = axes

    def _unknown(self, op: Op) -> list[Axes]:
        """Fix what an operation without rule takes and makes."""
        reason = f"feeds {op.name.strip('_')}, which may treat its units differently"
        reason = reason if op.inputs else _COMPUTED
        for value in op.inputs:
            for axis in self.known(value):
                fix(axis, reason)
        return [tuple(Symbol(n, reason) for n in value.tensor.shape) for value in op.outputs]


def _live(results: Sequence[Value]) -> set[Op]:
    """Return the operations that results depend on, those without inputs too."""
    live: set[Op] = set()
    queue = [value.producer for value in results]
    while queue:
        op = queue.pop()
        if op is not None and op not in live:
            live.add(op)
            queue.extend(value.producer for value in op.inputs)
    return live


def _arguments(op: Op) -> dict[str, Any]:
    """Return an operation's arguments by name, with the defaults of those not given."""
    if op.function is None:
        return {}
    schema: Iterable[Any] = op.function._schema.arguments
    arguments = {argument.name: argument.default_value for argument in schema}
    arguments.update(zip(arguments, op.args, strict=False))
    return {**arguments, **op.kwargs}


def _is_uniform(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor == tensor.reshape(-1)[0]).all())
