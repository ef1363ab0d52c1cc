"""Trace: the units of a network, found by watching one forward pass.

The module is run once under a dispatch mode that records every tensor operation with the module it
happened in. Nothing is recognised by the name or the class of a module, save `nn.BatchNorm*d`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mergewell.models.activation import Activation, is_affine, named
from mergewell.models.dataflow import Batch, Op, Recorder, Value, call, evaluating, parts, tensors
from mergewell.models.gated import Line, gated_units
from mergewell.models.graph import (
    MATRIX_PRODUCTS,
    SAME_ORDER,
    WEIGHT_OPS,
    Graph,
    Region,
    Uncovered,
    replayed,
)
from mergewell.models.hollow import filled
from mergewell.models.modules import module_units
from mergewell.models.units import CHEAP, Branch, Kind, Rows, Unit

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, slots=True)
class Trace:
    """What M-Loss can be measured on in a module, and by name what it cannot."""

    units: tuple[Unit, ...]
    """Of every kind, in the order of the forward pass."""

    uncovered: Mapping[str, str]
    """Modules (or parameters of the root) in no pointwise unit, with the reason."""

    @property
    def covered(self) -> tuple[Unit, ...]:
        """The pointwise units: layers with their activations, and gated units."""
        return self.of(CHEAP)

    def of(self, kinds: Sequence[Kind]) -> tuple[Unit, ...]:
        """Return the units of some kinds, in the order of the forward pass."""
        return tuple(unit for unit in self.units if unit.kind in kinds)


def trace(module: nn.Module, batch: Batch) -> Trace:
    """Return the units of a module, found by running it once on a small batch.

    A layer is covered when it is called once, is one linear map, and its output (through a
    BatchNorm, if any) reaches the rest of the network only through a nonlinear pointwise function
    of that output alone, or through the product of two such functions of layers on one input.
    Parameters on the meta device are stood in for by constants that take no memory, so that a
    large model can be traced before its weights are read. Memory: all intermediate tensors of the
    batch are kept, so one or two short samples are best.

    Raises:
        ModelError: the module returns no tensor that depends on its input.
    """
    with evaluating([module]), filled(module):
        inputs = tree_map_only(
            Tensor,
            lambda tensor: tensor.clone(),
            batch if isinstance(batch, Tensor) else dict(batch),
        )
        recorder = Recorder(module, tensors(inputs))
        with recorder.watching(module), recorder:
            result = call(module, inputs)
        return _Analysis(Graph(module, recorder, tensors(result))).trace()


class _Analysis:
    """Reads a recording."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._recorder = graph.recorder
        self._activated_by: dict[str, Unit] = {}

    def trace(self) -> Trace:
        """Return all units in forward order, and a reason for everything else."""
        recorder, order = self._recorder, self._graph.order
        uses: dict[str, list[Op]] = {}
        for op in recorder.ops:
            if any(value.is_data for value in op.inputs):
                states = {state for value in op.inputs for state in recorder.states(value, op)}
                for owner in {recorder.owners[state] for state in states}:
                    uses.setdefault(owner, []).append(op)
        found: dict[str, tuple[int, Unit]] = {}
        lines: list[Line] = []
        uncovered: dict[str, str] = {}
        for name, part in parts(self._graph.module):
            own = [short for short, _ in part.named_parameters(recurse=False)]
            if not own:
                continue
            try:
                op = self._linear_map(name, uses.get(name, []), self._sharers(part, name))
                line = self._line(name, op)
                lines.append(line)
                found[name] = (order[op], self._activated(line))
            except Uncovered as reason:
                for key in [name] if name else own:
                    uncovered[key] = str(reason)
        for index, unit in gated_units(self._graph, lines):
            for branch in unit.branches:  # a gate's own activation is but a part of its unit
                found.pop(branch.layer, None)
                uncovered.pop(branch.layer, None)
            found[unit.name] = (index, unit)
        for _, unit in found.values():
            for branch in unit.branches:
                uncovered.pop(branch.batch_norm or "", None)
        units = [*found.values(), *module_units(self._graph, [unit for _, unit in found.values()])]
        return Trace(tuple(unit for _, unit in sorted(units, key=lambda pair: pair[0])), uncovered)

    def _sharers(self, part: nn.Module, name: str) -> list[str]:
        """Return the other modules that hold all of this module's parameters."""
        own = [self._recorder.read(tensor).states for tensor in part.parameters(recurse=False)]
        owners = [{self._recorder.owners[state] for state in states} for states in own]
        return sorted(owners[0].intersection(*owners[1:]) - {name})

    def _linear_map(self, name: str, uses: Sequence[Op], sharers: Sequence[str]) -> Op:
        """Return the one linear map with the module's own weights, or raise the reason."""
        if not uses and sharers:
            raise Uncovered(f"only lends its parameters to {', '.join(sharers)}")
        if not uses:
            raise Uncovered("not reached by the forward pass")
        maps = [op for op in uses if op.name in WEIGHT_OPS]
        if not maps:
            raise Uncovered(_other_use(uses[0].name))
        if any(op.module != name for op in maps) or name not in self._recorder.calls:
            raise Uncovered("its weights are used outside its own forward pass")
        if (times := len(self._recorder.calls[name])) > 1:
            raise Uncovered(f"called {times} times in one forward pass")
        if len(maps) > 1:
            raise Uncovered(f"holds {len(maps)} linear maps in one module")
        return maps[0]

    def _line(self, name: str, op: Op) -> Line:
        """Return a layer's linear map from its input to what its BatchNorm, if any, returns."""
        output = self._output(name, op)
        node_dim = 1 if op.name == "convolution" else -1
        norm = self._batch_norm(output, node_dim)
        operands = op.inputs if op.name == "convolution" else op.inputs[-2:]
        return Line(
            layer=name,
            batch_norm=norm.module if norm else None,
            op=op,
            source=_before_views(operands[0]),
            end=norm.outputs[0] if norm else output,
            node_dim=node_dim,
            weight=sorted(self._recorder.states(operands[1], op))[0],
            weight_dim=_weight_dim(op, operands[1]),
        )

    def _activated(self, line: Line) -> Unit:
        """Return the unit of a layer and the activation that it feeds."""
        activation = self._activation(line.end)
        nodes = line.end.tensor.shape[line.node_dim]
        branch = Branch(line.layer, line.batch_norm, activation, Rows(line.weight, line.weight_dim))
        owned = line.owned(self._graph.module)
        return Unit(line.layer, "activation", owned, nodes, line.node_dim, (branch,))

    def _output(self, name: str, op: Op) -> Value:
        """Return what the module returned, if that is the linear map plus a bias at most."""
        operands = op.inputs if op.name == "convolution" else op.inputs[-2:]
        returned = self._recorder.calls[name][0]
        value = returned[0] if len(returned) == 1 else None
        if value is None or not operands[0].is_data or not operands[1].states:
            raise Uncovered("its module does more than one linear map of its input")
        if op.name in ("bmm", "baddbmm") and operands[1].tensor.stride(0) != 0:
            raise Uncovered("a batch of matrices, one for each group, and not one linear map")
        final = value
        while value.producer is not op:
            maker = value.producer
            data = [v for v in maker.inputs if v.is_data] if maker else []
            is_bias = maker is not None and maker.name == "add" and maker.module == name
            is_view = maker is not None and maker.is_view and maker.name in SAME_ORDER
            if len(data) != 1 or not (is_bias or is_view):
                raise Uncovered("its module does more than the linear map and its bias")
            value = data[0]
        return final

    def _batch_norm(self, value: Value, node_dim: int) -> Op | None:
        """Return the BatchNorm that alone consumes a layer's output, if there is one."""
        consumers = self._graph.consumers.get(value, [])
        alone = len(consumers) == 1 and value not in self._graph.results
        if not alone or "batch_norm" not in consumers[0].name:
            return None
        op = consumers[0]
        part = self._graph.module.get_submodule(op.module)
        if not isinstance(part, _BATCH_NORMS) or part.running_mean is None:
            raise Uncovered("feeds a batch normalisation that keeps no statistics of its own")
        if len(self._recorder.calls[op.module]) > 1:
            raise Uncovered(f"its BatchNorm {op.module} is called more than once")
        if node_dim % value.tensor.ndim != 1:
            raise Uncovered(f"its BatchNorm {op.module} runs over another dimension than nodes")
        return op

    def _activation(self, start: Value) -> Activation:
        """Return the pointwise function through which alone the network sees `start`."""
        region, outside = self._graph.region(start)
        exits = [v for v in region.origin if v in outside or v in self._graph.results]
        if not exits:
            raise Uncovered("its output does not reach the network's output")
        through = {start: {start}}  # all that must be passed to get to a value
        for value, sources in region.parents.items():
            through[value] = _common([through[source] for source in sources]) | {value}
        common = _common([through[value] for value in exits])
        last = [value for value in region.origin if value in common][-1]
        if (source := region.origin[last]) is not start and source.tensor.is_floating_point():
            activation = replayed(region, start, source)
            if not is_affine(activation):
                return named(activation)
        consumers = [op for value in exits for op in outside.get(value, [])]
        raise Uncovered(self._describe(consumers, region))

    def _describe(self, consumers: Sequence[Op], region: Region) -> str:
        """Return in plain words what stands where a pointwise activation would have to be."""
        if len(set(consumers)) > 1:
            what = sorted({self._consumer(op, region) for op in consumers})
            return f"has several consumers: {'; '.join(what)}"
        return self._consumer(consumers[0], region) if consumers else "is the network's output"

    def _consumer(self, op: Op, region: Region) -> str:
        others = [value for value in op.inputs if value not in region.origin]
        named = {self._recorder.owners[s] or s for v in others for s in v.states}
        owners = sorted(named)
        if op.name in WEIGHT_OPS and owners:
            return f"feeds {owners[-1]} with no activation in between"
        if "norm" in op.name:
            return f"feeds a normalisation ({_plain(op.name)}) before any activation"
        if "prelu" in op.name or (op.name in ("mul", "add", "div", "sub") and owners):
            return f"meets parameters or buffers of {', '.join(owners)} before any activation"
        if op.name in ("add", "sub", "rsub"):
            return "feeds a residual sum"
        if op.name in ("mul", "div"):
            return "is multiplied with another branch (gated)"
        if "attention" in op.name or op.name in MATRIX_PRODUCTS:
            return "feeds a product with another branch (attention)"
        if op.name in ("split", "chunk", "slice", "select", "unbind", "glu"):
            return "is split into parts before any activation"
        if op.name == "cat":
            return "is joined with other values before any activation"
        return f"feeds {_plain(op.name)}, which is not a pointwise function of it alone"


def _before_views(value: Value) -> Value:
    """Return the value that a linear map's operand is a view of."""
    while value.producer is not None and value.producer.is_view:
        value = next(v for v in value.producer.inputs if v.is_data)
    return value


def _weight_dim(op: Op, weight: Value) -> int:
    """Return which dimension of the parameter counts the nodes."""
    if op.name == "convolution":
        return 1 if op.args[6] is True else 0  # a transposed convolution holds [I, O, ...]
    turned = 0
    while weight.producer is not None:
        turned += weight.producer.name in ("t", "transpose", "permute")
        weight = next(v for v in weight.producer.inputs if v.states)
    return 0 if turned % 2 else weight.tensor.ndim - 1


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
