"""Module units: attentions, normalisations, repeated blocks and the output, found in a recording.

An attention is a product with a softmax of data, or torch's fused form; a normalisation divides by
a root or calls a fused normalisation; a block is a member of a list of like modules with residuals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from mergewell.models.dataflow import Op, Value, parts
from mergewell.models.graph import MATRIX_PRODUCTS, WEIGHT_OPS, Graph
from mergewell.models.units import Kind, Unit

OUTPUT = "(output)"
"""Name of the unit that is the whole model; no module can have it."""


def module_units(graph: Graph, pointwise: Sequence[Unit]) -> list[tuple[int, Unit]]:
    """Return the module units of a recording, each with the place in time of its first operation.

    `pointwise` are the other units: an attention module must hold none of them.
    """
    finder = _Finder(graph, pointwise)
    return [*finder.attentions(), *finder.norms(), *finder.blocks(), *finder.output()]


class _Finder:
    def __init__(self, graph: Graph, pointwise: Sequence[Unit]) -> None:
        self._graph = graph
        self._pointwise = [branch.layer for unit in pointwise for branch in unit.branches]
        self._folded = {branch.batch_norm for unit in pointwise for branch in unit.branches}
        self._modules = dict(parts(graph.module))
        self._inside: dict[str, list[Op]] = {}
        for op in graph.recorder.ops:
            for name in _ancestors(op.module):
                self._inside.setdefault(name, []).append(op)

    def attentions(self) -> Iterator[tuple[int, Unit]]:
        """Yield the smallest module that holds an attention with its projections."""
        done: set[str] = set()
        for op in self._graph.recorder.ops:
            if not self._is_core(op):
                continue
            before, after = self._maps_before(op), self._map_after(op)
            wanted = [op, *before, *([after] if after else [])]
            name = self._holder(wanted) or self._holder([op, *before])
            if name is None or name in done:
                continue
            done.add(name)
            heads, module = self._heads(op, after, name)
            yield from self._made("attention", name, heads=heads, head_module=module)

    def norms(self) -> Iterator[tuple[int, Unit]]:
        """Yield every module with parameters of its own in which data are normalised."""
        for name, part in self._modules.items():
            own = any(True for _ in part.parameters(recurse=False))
            ops = self._inside.get(name, [])
            if not own or not name or name in self._folded or any(True for _ in part.children()):
                continue
            if any(_is_norm(op) for op in ops) and not any(op.name in WEIGHT_OPS for op in ops):
                yield from self._made("norm", name)

    def blocks(self) -> Iterator[tuple[int, Unit]]:
        """Yield the members of lists of like modules of which some add up residuals.

        Of lists in lists the innermost: the blocks of a stage and not the stage.
        """
        found: dict[str, None] = {}
        for name, part in self._modules.items():
            if not isinstance(part, nn.ModuleList | nn.Sequential):
                continue
            members = [(f"{name}.{key}" if name else key, m) for key, m in part.named_children()]
            kinds = [type(module) for _, module in members]
            residual = {type(module) for own, module in members if self._has_residual(own)}
            for own, module in members:
                alike = kinds.count(type(module)) > 1 or len(members) == 1
                if alike and type(module) in residual:
                    found[own] = None
        for own in found:
            if not any(_within(other, [own]) for other in found if other != own):
                yield from self._made("block", own)

    def _has_residual(self, name: str) -> bool:
        """Return whether two values made from data are added inside a module with two maps."""
        ops = self._inside.get(name, [])
        maps = [op for op in ops if op.name in WEIGHT_OPS]
        return len(maps) > 1 and any(
            op.name == "add" and sum(value.is_data for value in op.inputs) == 2 for op in ops
        )

    def output(self) -> Iterator[tuple[int, Unit]]:
        """Yield the whole model, last in time."""
        for _, unit in self._made("output", ""):
            yield len(self._graph.recorder.ops), unit

    def _made(
        self, kind: Kind, name: str, *, heads: int = 0, head_module: str = ""
    ) -> Iterator[tuple[int, Unit]]:
        """Yield a module as a unit, if it is called once and returns data with nodes."""
        calls = self._graph.recorder.calls.get(name, [])
        ops = self._inside.get(name, [])
        result = calls[0][0] if len(calls) == 1 and calls[0] else None
        if result is None or not ops or not result.is_data or result.tensor.ndim < 2:
            return
        node_dim = self._node_dim(ops, result.tensor)
        parameters = tuple(
            f"{name}.{short}" if name else short
            for short, _ in self._modules[name].named_parameters()
        )
        yield (
            self._graph.order[ops[0]],
            Unit(
                name or OUTPUT,
                kind,
                parameters,
                result.tensor.shape[node_dim],
                node_dim,
                heads=heads,
                head_module=head_module,
            ),
        )

    def _node_dim(self, ops: Sequence[Op], result: Tensor) -> int:
        """Return 1 where the last map with weights is a convolution or a norm over channels."""
        if result.ndim < 3:
            return -1
        names = [op.name for op in ops if op.name in WEIGHT_OPS or "norm" in op.name]
        last = names[-1] if names else ""
        return 1 if last == "convolution" or "batch_norm" in last or "group_norm" in last else -1

    def _is_core(self, op: Op) -> bool:
        """Return whether an operation weighs values by a softmax of data."""
        data = [value for value in op.inputs if value.is_data]
        if "scaled_dot_product" in op.name:
            return len(data) >= 3
        if op.name not in MATRIX_PRODUCTS or len(data) != 2:
            return False
        return any(self._comes_from_softmax(value) for value in data)

    def _comes_from_softmax(self, value: Value) -> bool:
        """Return whether views, casts and copies alone stand between a softmax and a value."""
        while (op := value.producer) is not None and "softmax" not in op.name:
            data = [v for v in op.inputs if v.is_data]
            if op.name in WEIGHT_OPS or len(data) != 1:
                return False
            value = data[0]
        return op is not None

    def _maps_before(self, core: Op) -> list[Op]:
        """Return the nearest maps with weights that an attention's operands come from."""
        found: list[Op] = []
        seen: set[Op] = set()
        queue = [value.producer for value in core.inputs if value.is_data]
        while queue:
            op = queue.pop()
            if op is None or op in seen:
                continue
            seen.add(op)
            if op.name in WEIGHT_OPS and any(value.states for value in op.inputs):
                found.append(op)
            else:
                queue.extend(value.producer for value in op.inputs if value.is_data)
        return found

    def _map_after(self, core: Op) -> Op | None:
        """Return the map with weights that alone reads an attention's values: the projection."""
        value = core.outputs[0]
        while True:
            consumers = self._graph.consumers.get(value, [])
            if len(consumers) != 1 or not consumers[0].outputs:
                return None
            op = consumers[0]
            if op.name in WEIGHT_OPS:
                return op if any(v.states for v in op.inputs) else None
            if len([v for v in op.inputs if v.is_data]) != 1:
                return None
            value = op.outputs[0]

    def _holder(self, ops: Sequence[Op]) -> str | None:
        """Return the smallest module that was called once and in which all these happen."""
        shared = [set(_ancestors(op.module)) for op in ops]
        for name in sorted(shared[0].intersection(*shared[1:]), key=len, reverse=True):
            if len(self._graph.recorder.calls.get(name, [])) != 1:
                continue
            holds = any(_within(layer, [name]) for layer in self._pointwise)
            return name if name and not holds else None
        return None

    def _heads(self, core: Op, after: Op | None, name: str) -> tuple[int, str]:
        """Return the number of heads and the projection's module, if its input is the heads'."""
        if after is None or after.module == name or not _within(after.module, [name]):
            return 0, ""
        owners = {self._graph.recorder.owners[s] for v in after.inputs for s in v.states}
        if after.module not in owners:  # then the module's input need not be the heads' values
            return 0, ""
        called = self._graph.recorder.calls.get(after.module, [])
        operand = after.inputs[-2] if after.name in MATRIX_PRODUCTS else after.inputs[0]
        values = core.outputs[0].tensor
        width, size = operand.tensor.shape[-1], values.shape[-1]
        if len(called) != 1 or width % size or values.numel() != operand.tensor.numel():
            return 0, ""
        heads = width // size
        if "scaled_dot_product" in core.name:
            split = values.ndim == 4 and values.shape[1] == heads
        else:
            split = values.ndim == 3 and values.shape[0] % heads == 0
        return (heads, after.module) if split else (0, "")


def _is_norm(op: Op) -> bool:
    return "norm" in op.name or op.name == "rsqrt"


def _ancestors(name: str) -> list[str]:
    """Return a module's name and those of all modules around it, the root's included."""
    words = name.split(".") if name else []
    return [".".join(words[:length]) for length in range(len(words), -1, -1)]


def _within(name: str, holders: Sequence[str]) -> bool:
    return any(name == holder or name.startswith(f"{holder}.") or not holder for holder in holders)
