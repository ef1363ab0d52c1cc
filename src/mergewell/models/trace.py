"""Trace: which layer feeds which pointwise activation, found by watching one forward pass.

The module is run once under a dispatch mode that records every tensor operation with the module it
happened in. Nothing is recognised by the name or the class of a module, save `nn.BatchNorm*d`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mergewell.errors import ModelError
from mergewell.models.activation import Activation, Slot, Step, is_affine, named
from mergewell.models.dataflow import (
    Batch,
    Op,
    Recorder,
    Value,
    call,
    evaluating,
    geometry,
    parts,
    tensors,
)

_MATRIX_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
_WEIGHT_OPS = _MATRIX_PRODUCTS | {"convolution"}
_POINTWISE_TOO = frozenset({"_to_copy", "hardswish", "zeros_like", "ones_like", "full_like"})
"""Pointwise operations that torch does not tag as such."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SAME_ORDER = frozenset(
    {"view", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze", "alias", "detach"}
)
"""Views after which the nodes are still where the linear map put them."""


@dataclass(frozen=True, slots=True)
class ActivatedLayer:
    """A linear layer or convolution with the pointwise activation that it feeds."""

    layer: str
    """Name of the module that holds the weights."""

    batch_norm: str | None
    """Name of the BatchNorm between layer and activation, if there is one."""

    activation: Activation

    node_dim: int
    """Dimension of the layer's output that counts the nodes: -1 (linear) or 1 (convolution)."""

    nodes: int
    """Number of nodes, O."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What M-Loss can be measured on in a module, and by name what it cannot."""

    covered: tuple[ActivatedLayer, ...]
    """In the order of the forward pass."""

    uncovered: Mapping[str, str]
    """Every other module (or parameter of the root) that has parameters, with the reason."""


def trace(module: nn.Module, batch: Batch) -> Trace:
    """Return which layers feed which activation, by running `module` once on a small batch.

    A layer is covered when it is called once, is one linear map, and its output (through a
    BatchNorm, if any) reaches the rest of the network only through a nonlinear pointwise function
    of that output alone. Memory: all intermediate tensors of the batch are kept.

    Raises:
        ModelError: the module returns no tensor that depends on its input.
    """
    with evaluating([module]):
        inputs = tree_map_only(
            Tensor,
            lambda tensor: tensor.clone(),
            batch if isinstance(batch, Tensor) else dict(batch),
        )
        recorder = Recorder(module, tensors(inputs))
        with recorder.watching(module), recorder:
            result = call(module, inputs)
        return _Analysis(module, recorder, tensors(result)).trace()


class _Uncovered(Exception):  # noqa: N818 - a reason, not an error
    """Carries why a layer is not covered."""


@dataclass(slots=True)
class _Region:
    """The pointwise functions of one value, with what each is made from."""

    origin: dict[Value, Value]
    """Each member's value before views, which pointwise functions pass through."""
    layout: dict[Value, tuple[object, ...]]
    """The views that each member went through."""
    parents: dict[Value, list[Value]]


class _Analysis:
    """Reads a recording."""

    def __init__(self, module: nn.Module, recorder: Recorder, results: Sequence[Tensor]) -> None:
        self._module = module
        self._recorder = recorder
        self._results = [value for value in map(recorder.read, results) if value.is_data]
        if not self._results:
            raise ModelError(
                f"{type(module).__name__} returned no tensor that depends on its input: pass it "
                "the inputs that its forward pass uses."
            )
        live = self._live()
        self._consumers: dict[Value, list[Op]] = {}
        for op in recorder.ops:
            for value in set(op.inputs) if op in live else ():
                self._consumers.setdefault(value, []).append(op)

    def trace(self) -> Trace:
        """Return covered layers in forward order, and a reason for everything else."""
        recorder = self._recorder
        uses: dict[str, list[Op]] = {}
        for op in recorder.ops:
            if any(value.is_data for value in op.inputs):
                states = {state for value in op.inputs for state in recorder.states(value, op)}
                for owner in {recorder.owners[state] for state in states}:
                    uses.setdefault(owner, []).append(op)
        covered: list[tuple[int, ActivatedLayer]] = []
        uncovered: dict[str, str] = {}
        for name, part in parts(self._module):
            own = [short for short, _ in part.named_parameters(recurse=False)]
            if not own:
                continue
            try:
                op = self._linear_map(name, uses.get(name, []), self._sharers(part, name))
                covered.append((self._recorder.ops.index(op), self._activated(name, op)))
            except _Uncovered as reason:
                for key in [name] if name else own:
                    uncovered[key] = str(reason)
        layers = tuple(layer for _, layer in sorted(covered, key=lambda pair: pair[0]))
        for layer in layers:
            uncovered.pop(layer.batch_norm or "", None)
        return Trace(layers, uncovered)

    def _live(self) -> set[Op]:
        """Return the operations that the module's results depend on."""
        live: set[Op] = set()
        queue = [value.producer for value in self._results]
        while queue:
            op = queue.pop()
            if op is not None and op not in live:
                live.add(op)
                queue.extend(value.producer for value in op.inputs)
        return live

    def _sharers(self, part: nn.Module, name: str) -> list[str]:
        """Return the other modules that hold all of this module's parameters."""
        own = [self._recorder.read(tensor).states for tensor in part.parameters(recurse=False)]
        owners = [{self._recorder.owners[state] for state in states} for states in own]
        return sorted(owners[0].intersection(*owners[1:]) - {name})

    def _linear_map(self, name: str, uses: Sequence[Op], sharers: Sequence[str]) -> Op:
        """Return the one linear map with the module's own weights, or raise the reason."""
        if not uses and sharers:
            raise _Uncovered(f"only lends its parameters to {', '.join(sharers)}")
        if not uses:
            raise _Uncovered("not reached by the forward pass")
        maps = [op for op in uses if op.name in _WEIGHT_OPS]
        if not maps:
            raise _Uncovered(_other_use(uses[0].name))
        if any(op.module != name for op in maps) or name not in self._recorder.calls:
            raise _Uncovered("its weights are used outside its own forward pass")
        if (times := len(self._recorder.calls[name])) > 1:
            raise _Uncovered(f"called {times} times in one forward pass")
        if len(maps) > 1:
            raise _Uncovered(f"holds {len(maps)} linear maps in one module")
        return maps[0]

    def _activated(self, name: str, op: Op) -> ActivatedLayer:
        output = self._output(name, op)
        node_dim = 1 if op.name == "convolution" else -1
        norm = self._batch_norm(output, node_dim)
        start = norm.outputs[0] if norm else output
        activation = self._activation(start)
        nodes = output.tensor.shape[node_dim]
        return ActivatedLayer(name, norm.module if norm else None, activation, node_dim, nodes)

    def _output(self, name: str, op: Op) -> Value:
        """Return what the module returned, if that is the linear map plus a bias at most."""
        operands = op.inputs if op.name == "convolution" else op.inputs[-2:]
        returned = self._recorder.calls[name][0]
        value = returned[0] if len(returned) == 1 else None
        if value is None or not operands[0].is_data or not operands[1].states:
            raise _Uncovered("its module does more than one linear map of its input")
        if op.name in ("bmm", "baddbmm") and operands[1].tensor.stride(0) != 0:
            raise _Uncovered("a batch of matrices, one for each group, and not one linear map")
        final = value
        while value.producer is not op:
            maker = value.producer
            data = [v for v in maker.inputs if v.is_data] if maker else []
            is_bias = maker is not None and maker.name == "add" and maker.module == name
            is_view = maker is not None and maker.is_view and maker.name in _SAME_ORDER
            if len(data) != 1 or not (is_bias or is_view):
                raise _Uncovered("its module does more than the linear map and its bias")
            value = data[0]
        return final

    def _batch_norm(self, value: Value, node_dim: int) -> Op | None:
        """Return the BatchNorm that alone consumes a layer's output, if there is one."""
        consumers = self._consumers.get(value, [])
        if len(consumers) != 1 or value in self._results or "batch_norm" not in consumers[0].name:
            return None
        op = consumers[0]
        part = self._module.get_submodule(op.module)
        if not isinstance(part, _BATCH_NORMS) or part.running_mean is None:
            raise _Uncovered("feeds a batch normalisation that keeps no statistics of its own")
        if len(self._recorder.calls[op.module]) > 1:
            raise _Uncovered(f"its BatchNorm {op.module} is called more than once")
        if node_dim % value.tensor.ndim != 1:
            raise _Uncovered(f"its BatchNorm {op.module} runs over another dimension than nodes")
        return op

    def _activation(self, start: Value) -> Activation:
        """Return the pointwise function through which alone the network sees `start`."""
        region, outside = self._region(start)
        exits = [v for v in region.origin if v in outside or v in self._results]
        if not exits:
            raise _Uncovered("its output does not reach the network's output")
        through = {start: {start}}  # all that must be passed to get to a value
        for value, sources in region.parents.items():
            through[value] = _common([through[source] for source in sources]) | {value}
        common = _common([through[value] for value in exits])
        last = [value for value in region.origin if value in common][-1]
        if (source := region.origin[last]) is not start and source.tensor.is_floating_point():
            activation = _replayable(region, start, source)
            if not is_affine(activation):
                return named(activation)
        consumers = [op for value in exits for op in outside.get(value, [])]
        raise _Uncovered(self._describe(consumers, region))

    def _region(self, start: Value) -> tuple[_Region, dict[Value, list[Op]]]:
        """Return the pointwise region of `start`, and who consumes its members outside it."""
        region = _Region({start: start}, {start: ()}, {})
        outside: dict[Value, list[Op]] = {}
        queue = set(self._consumers.get(start, []))
        for op in self._recorder.ops:  # in the order of time, so that inputs come first
            if op not in queue:
                continue
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
            queue.update(self._consumers.get(made, []))
        return region, outside

    def _describe(self, consumers: Sequence[Op], region: _Region) -> str:
        """Return in plain words what stands where a pointwise activation would have to be."""
        if len(set(consumers)) > 1:
            what = sorted({self._consumer(op, region) for op in consumers})
            return f"has several consumers: {'; '.join(what)}"
        return self._consumer(consumers[0], region) if consumers else "is the network's output"

    def _consumer(self, op: Op, region: _Region) -> str:
        others = [value for value in op.inputs if value not in region.origin]
        named = {self._recorder.owners[s] or s for v in others for s in v.states}
        owners = sorted(named)
        if op.name in _WEIGHT_OPS and owners:
            return f"feeds {owners[-1]} with no activation in between"
        if "norm" in op.name:
            return f"feeds a normalisation ({_plain(op.name)}) before any activation"
        if "prelu" in op.name or (op.name in ("mul", "add", "div", "sub") and owners):
            return f"meets parameters or buffers of {', '.join(owners)} before any activation"
        if op.name in ("add", "sub", "rsub"):
            return "feeds a residual sum"
        if op.name in ("mul", "div"):
            return "is multiplied with another branch (gated)"
        if "attention" in op.name or op.name in _MATRIX_PRODUCTS:
            return "feeds a product with another branch (attention)"
        if op.name in ("split", "chunk", "slice", "select", "unbind", "glu"):
            return "is split into parts before any activation"
        if op.name == "cat":
            return "is joined with other values before any activation"
        return f"feeds {_plain(op.name)}, which is not a pointwise function of it alone"


def _other_use(name: str) -> str:
    if "embedding" in name or name in ("index", "index_select", "gather"):
        return "a table of embeddings, not a linear layer"
    if "norm" in name:
        return f"a normalisation ({_plain(name)}), not part of a covered layer"
    return f"its parameters meet the data in {_plain(name)}, not in a linear layer or convolution"


def _plain(name: str) -> str:
    """Return an operation's name without what only torch's kernels tell apart."""
    kinds = [kind for kind in ("batch_norm", "layer_norm", "group_norm") if kind in name]
    return kinds[0] if kinds else name.strip("_")


def _common(sets: Sequence[set[Value]]) -> set[Value]:
    return sets[0].intersection(*sets[1:])


def _is_pointwise(op: Op) -> bool:
    tags = op.function.tags if op.function is not None else ()
    random = torch.Tag.nondeterministic_seeded in tags
    tagged = torch.Tag.pointwise in tags or op.name in _POINTWISE_TOO
    return tagged and not random and "out" not in op.kwargs


def _replayable(region: _Region, start: Value, end: Value) -> Activation:
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

    add(end)
    return Activation("custom", tuple(steps))
