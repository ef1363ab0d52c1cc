"""Tracing: the permutation graph of any module, found by watching one forward pass.

Nothing is recognised by the name or the class of a module. What is found: outputs of linear maps
and convolutions through pointwise functions, norms and poolings; sums tie groups together; a
flatten after a convolution makes blocks; attention heads are permuted whole, and their widths
inside each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from mergewell.alignment.inference import Inference
from mergewell.alignment.permutations import Axis, Group, PermutationGraph
from mergewell.alignment.symbols import Symbol, fix, leaves, monomials, parts_of
from mergewell.models.dataflow import Batch, Value


def permutation_graph(module: nn.Module, batch: Batch) -> PermutationGraph:
    """Return what can be permuted in a module without a change of its outputs.

    The module runs once on the batch, in eval mode; one or two short samples are best. Inputs and
    outputs are fixed, and so is what meets an operation that is not known to treat units alike.

    Source: Ainsworth, Hayase and Srinivasa 2023, "Git Re-Basin", arXiv:2209.04836, section 3.
    Departures: the graph is found and not written for each architecture; attention is covered.

    Raises:
        ModelError: the module returns no tensor that depends on its input.
    """
    inference = Inference(module, batch)
    _fix_unused(inference)
    names = _names(inference)
    within = _within(inference, names)
    groups = {name: Group(name, leaf.size, within.get(name, "")) for leaf, name in names.items()}
    axes = {
        name: tuple(_frozen(axis, names) for axis in inference.known(value))
        for name, value in inference.states.items()
    }
    outputs = {
        key: tuple(_frozen(axis, names) for axis in inference.known(value))
        for value, key in _returned(inference).items()
    }
    return PermutationGraph(
        groups,
        {name: own for name, own in axes.items() if _has_group(own)},
        dict(_fixed(inference)),
        {key: own for key, own in outputs.items() if _has_group(own)},
    )


def _fix_unused(inference: Inference) -> None:
    """Fix parameters that the results do not depend on."""
    used = {value for op in inference.live for value in op.inputs}
    for value in inference.states.values():
        if value not in used:
            for axis in inference.known(value):
                fix(axis, "is not reached by the forward pass")


def _returned(inference: Inference) -> dict[Value, tuple[str, int, int]]:
    """Return the tensors that modules return, each with the first module that returns it."""
    found: dict[Value, tuple[str, int, int]] = {}
    for module, calls in inference.graph.recorder.calls.items():
        for number, values in enumerate(calls):
            for place, value in enumerate(values):
                if value in inference.axes:
                    found.setdefault(value, (module, number, place))
    return found


def _names(inference: Inference) -> dict[Symbol, str]:
    """Return a name for every leaf that can be permuted and stands in a parameter."""
    names: dict[Symbol, str] = {}
    for name, value in inference.states.items():
        for dim, axis in enumerate(inference.known(value)):
            own = [leaf for leaf in leaves(axis) if leaf.size > 1]
            for place, leaf in enumerate(own):
                if not leaf.fixed and leaf not in names:
                    names[leaf] = f"{name}:{dim}" + (f".{place}" if len(own) > 1 else "")
    return names


def _within(inference: Inference, names: Mapping[Symbol, str]) -> dict[str, str]:
    """Return the outer group of every group that may be permuted differently in each of its units.

    So it is where no tensor, nor what an operation holds for a while, has the inner units without
    the outer ones, or the outer ones twice; and where in parameters both run along one dimension.
    """
    company: dict[Symbol, set[Symbol]] = {}
    twice: set[Symbol] = set()
    for axes in inference.seen:
        for together in monomials(axes):
            own = [leaf for leaf in together if leaf in names]
            twice |= {leaf for leaf in own if own.count(leaf) > 1}
            for leaf in own:
                company[leaf] = company.get(leaf, set(own)) & set(own)
    for value in inference.states.values():
        for axis in inference.known(value):
            for leaf, inside in _nested(axis, ()):
                company[leaf] = company.get(leaf, set()) & inside
    around = {
        leaf: [outer for outer in names if outer in company.get(leaf, ()) and outer not in twice]
        for leaf in names
    }
    free = {leaf: [o for o in outer if not around[o]] for leaf, outer in around.items()}
    return {names[leaf]: names[outer[0]] for leaf, outer in free.items() if outer}


def _nested(axis: Symbol, around: Sequence[Symbol]) -> Iterator[tuple[Symbol, set[Symbol]]]:
    """Yield the leaves of an axis with those that they lie in, as factors on their left."""
    axis = axis.found()
    if axis.kind == "leaf":
        yield axis, set(around)
        return
    inside = [*around]
    for part in parts_of(axis, axis.kind):
        yield from _nested(part, inside)
        if axis.kind == "product" and part.kind == "leaf":
            inside.append(part)


def _frozen(axis: Symbol, names: Mapping[Symbol, str]) -> Axis:
    axis = axis.found()
    if axis.kind == "leaf":
        known = axis in names
        return Axis("group" if known else "fixed", axis.size, names.get(axis, ""))
    parts = tuple(_frozen(part, names) for part in parts_of(axis, axis.kind))
    if not any(True for part in parts for _ in part.groups()):
        return Axis("fixed", axis.size)
    return Axis("product" if axis.kind == "product" else "sum", axis.size, parts=parts)


def _has_group(axes: Iterable[Axis]) -> bool:
    return any(True for axis in axes for _ in axis.groups())


def _fixed(inference: Inference) -> Iterator[tuple[str, str]]:
    """Yield the dimensions of parameters that are kept in order wholly, with the reasons."""
    for name, value in inference.states.items():
        for dim, axis in enumerate(inference.known(value)):
            own = [leaf for leaf in leaves(axis) if leaf.size > 1]
            if own and all(leaf.fixed for leaf in own):
                yield f"{name}:{dim}", "; ".join(dict.fromkeys(leaf.fixed for leaf in own))
