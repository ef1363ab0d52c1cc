"""Gated units: two pointwise branches of linear maps on one input, multiplied (SwiGLU and kin)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from mergewell.models.activation import IDENTITY, SIGMOID, Activation, is_affine, named
from mergewell.models.dataflow import Op, Value
from mergewell.models.graph import SAME_ORDER, Graph, Region, replayed
from mergewell.models.units import Branch, Rows, Unit


@dataclass(frozen=True, slots=True)
class Line:
    """A layer that is one linear map, and its BatchNorm if any, in a recording."""

    layer: str
    batch_norm: str | None
    op: Op
    source: Value
    """The layer's input, before views."""
    end: Value
    """What the layer, or its BatchNorm, returned."""
    node_dim: int
    weight: str
    """Name of the weight."""
    weight_dim: int
    """Dimension of the weight that counts the nodes."""

    def owned(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters of the layer and of its BatchNorm."""
        return tuple(
            f"{name}.{short}" if name else short
            for name in (self.layer, *([self.batch_norm] if self.batch_norm else []))
            for short, _ in module.get_submodule(name).named_parameters(recurse=False)
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A line's output, or a part of its nodes."""

    line: Line
    start: int
    step: int
    nodes: int
    value: Value
    region: Region
    outside: dict[Value, list[Op]]

    def branch(self, activation: Activation) -> Branch:
        """Return this part as the branch of a unit."""
        line = self.line
        rows = Rows(line.weight, line.weight_dim, self.start, self.step)
        return Branch(line.layer, line.batch_norm, activation, rows)


def gated_units(graph: Graph, lines: Sequence[Line]) -> Iterator[tuple[int, Unit]]:
    """Yield every gated unit of a recording, with the place of its first layer in time.

    Two branches belong together when the network sees each of them only through their product.
    """
    factors: dict[Op, list[tuple[_Part, Value]]] = {}
    for line in lines:
        for part in _parts(graph, line):
            consumers = {op for ops in part.outside.values() for op in ops}
            if len(consumers) != 1 or any(value in part.region.origin for value in graph.results):
                continue
            (op,) = consumers
            (seen,) = list(part.outside) if len(part.outside) == 1 else [None]
            if op.name == "mul" and seen is not None and len(op.inputs) == 2:
                factors.setdefault(op, []).append((part, seen))
        yield from _glu(graph, line)
    for found in factors.values():
        if len(found) == 2:
            unit = _unit(graph, *found)
            if unit is not None:
                yield unit


def _unit(
    graph: Graph, left: tuple[_Part, Value], right: tuple[_Part, Value]
) -> tuple[int, Unit] | None:
    """Return the unit of two factors; the one with the nonlinear function is the gate."""
    (one, seen_one), (two, seen_two) = left, right
    alike = one.line.source is two.line.source and one.line.node_dim == two.line.node_dim
    turned = one.region.layout[seen_one] != two.region.layout[seen_two]
    if not alike or turned or one.nodes != two.nodes:
        return None
    functions = [_function(one, seen_one), _function(two, seen_two)]
    pairs = [(one, functions[0]), (two, functions[1])]
    gate, factor = pairs if not is_affine(functions[0]) else reversed(pairs)
    return _made(graph, gate[0].line, gate[0].branch(gate[1]), factor[0].branch(factor[1]), one)


def _made(graph: Graph, line: Line, gate: Branch, factor: Branch, like: _Part) -> tuple[int, Unit]:
    names: dict[str, None] = {}
    for branch in (gate, factor):
        for name in (branch.layer, branch.batch_norm or branch.layer):
            module = graph.module.get_submodule(name)
            for short, _ in module.named_parameters(recurse=False):
                names[f"{name}.{short}" if name else short] = None
    unit = Unit(line.layer, "gated", tuple(names), like.nodes, line.node_dim, (gate, factor))
    index = graph.order[line.op]
    return index, unit


def _function(part: _Part, seen: Value) -> Activation:
    if part.region.origin[seen] is part.value:
        return IDENTITY
    return named(replayed(part.region, part.value, seen))


def _parts(graph: Graph, line: Line) -> Iterator[_Part]:
    """Yield a line's whole output, then every part of its nodes that is cut out of it."""
    region, outside = graph.region(line.end)
    nodes = line.end.tensor.shape[line.node_dim]
    yield _Part(line, 0, 1, nodes, line.end, region, outside)
    cuts = {op for value, ops in outside.items() if _is_whole(region, value) for op in ops}
    for op in sorted(cuts, key=graph.order.__getitem__):
        for value in op.outputs:
            place = _place(line, value)
            if place is not None:
                inner, beyond = graph.region(value)
                count = value.tensor.shape[line.node_dim]
                yield _Part(line, *place, count, value, inner, beyond)


def _is_whole(region: Region, value: Value) -> bool:
    """Return whether a member of a line's region is its output itself, as a view at most."""
    views = region.layout[value]
    plain = all(isinstance(view, tuple) and view[0] in SAME_ORDER for view in views)
    return plain and region.origin[value] is next(iter(region.origin))


def _place(line: Line, value: Value) -> tuple[int, int] | None:
    """Return (start, step) of a view of some of a line's nodes; None if it is anything else."""
    whole, cut = line.end.tensor, value.tensor
    dim = line.node_dim % whole.ndim
    same_memory = whole.untyped_storage().data_ptr() == cut.untyped_storage().data_ptr()
    if not same_memory or cut.ndim != whole.ndim:
        return None
    others = [axis for axis in range(whole.ndim) if axis != dim]
    if any(whole.shape[a] != cut.shape[a] for a in others):
        return None
    if any(whole.stride(a) != cut.stride(a) for a in others if whole.shape[a] > 1):
        return None
    offset = int(cut.storage_offset()) - int(whole.storage_offset())
    step = whole.stride(dim)
    if cut.stride(dim) % step or offset % step or not 0 <= offset // step < whole.shape[dim]:
        return None
    return offset // step, cut.stride(dim) // step


def _glu(graph: Graph, line: Line) -> Iterator[tuple[int, Unit]]:
    """Yield the unit of torch's own gated linear unit: first half times sigmoid of the second."""
    consumers = graph.consumers.get(line.end, [])
    if len(consumers) != 1 or consumers[0].name != "glu" or line.end in graph.results:
        return
    ndim, dim = line.end.tensor.ndim, consumers[0].args[1] if len(consumers[0].args) > 1 else -1
    if dim % ndim != line.node_dim % ndim:
        return
    nodes = line.end.tensor.shape[line.node_dim] // 2
    region = Region({line.end: line.end}, {line.end: ()}, {})
    halves = [_Part(line, start, 1, nodes, line.end, region, {}) for start in (nodes, 0)]
    gate, factor = halves[0].branch(SIGMOID), halves[1].branch(IDENTITY)
    yield _made(graph, line, gate, factor, halves[0])
