"""Rules: what one recorded operation says of the symbols along the dimensions of its tensors.

A rule unifies the symbols of dimensions that must be permuted alike, fixes those whose order the
operation looks at, and returns the symbols of what the operation makes. What has no rule is taken
to look at every order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergewell.alignment.symbols import Symbol, cut, factored, fix, product, total, unify
from mergewell.models.dataflow import Op, Value

Axes = tuple[Symbol, ...]
"""The symbols along a tensor's dimensions."""

POSITIONS = "positions of a convolution or a pooling"
_INDEXED = "is looked up by index"
_PICKED = "one of its entries is picked"


@dataclass(slots=True)
class Call:
    """One operation with its arguments by name, and what is known of its inputs."""

    op: Op
    arguments: Mapping[str, Any]
    known: Callable[[Value], Axes]
    hidden: list[Axes] = field(default_factory=list[Axes])
    """Axes of what the operation holds for a while: its inputs without what it sums over."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def axes(self, name: str) -> Axes:
        """Return the axes of an argument that is a tensor."""
        given = self.arguments[name]
        if isinstance(given, Value):
            return self.known(given)
        return tuple(Symbol(size) for size in given.shape)  # a constant of one element

    def has(self, name: str) -> bool:
        """Return whether an argument is a tensor with axes."""
        return isinstance(self.arguments.get(name), Value)

    def dim(self, name: str, count: int) -> int:
        """Return a dimension that an argument names, counted from the front."""
        return int(self.arguments[name]) % max(count, 1)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return the shape of what the operation made."""
        return tuple(self.op.outputs[index].tensor.shape)


Rule = Callable[[Call], "Sequence[Axes]"]
RULES: dict[str, Rule] = {}
"""By the operation's name; what is returned are the axes of its outputs, those left out are new."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def is_pointwise(op: Op) -> bool:
    """Return whether an operation treats every element alike, after broadcasting."""
    tags = op.function.tags if op.function is not None else ()
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return torch.Tag.pointwise in tags or op.name in ("hardswish", "_prelu_kernel", "copy")


def pointwise(call: Call) -> list[Axes]:
    """Unify the dimensions that meet in a pointwise operation."""
    operands = [call.known(value) for value in call.op.inputs]
    if call.op.name == "copy":  # what is written over does not matter
        operands = operands[1:]
    return [broadcast(operands, call.shape())]


def broadcast(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """Return the axes of a shape to which operands are broadcast; where none has units: new ones.

    Along a new axis all entries are equal, so that any order is as good.
    """
    made: list[Symbol] = []
    for place, size in enumerate(reversed(shape), 1):
        met = [axes[-place] for axes in operands if len(axes) >= place and axes[-place].size != 1]
        for other in met[1:]:
            unify(met[0], other)
        made.append(met[0] if met else Symbol(size))
    return tuple(reversed(made))


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous")
def _same(call: Call) -> list[Axes]:
    return [call.known(value) for value in call.op.inputs[:1]]


@rule(
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
    "zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "zero", "fill",
    "empty_strided", "new_empty_strided",
)  # fmt: skip
def _uniform(_call: Call) -> list[Axes]:
    return []


@rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def _reshape(call: Call) -> list[Axes]:
    made = tuple(Symbol(size) for size in call.shape())
    unify(product(made), product(call.axes("self")))
    return [made]


@rule("t", "transpose", "permute", "numpy_T", "squeeze", "unsqueeze", "expand")
def _moved(call: Call) -> list[Axes]:
    axes, name = list(call.axes("self")), call.op.name
    count = len(axes)
    if name in ("t", "numpy_T"):
        return [tuple(reversed(axes))]
    if name == "transpose":
        one, two = call.dim("dim0", count), call.dim("dim1", count)
        axes[one], axes[two] = axes[two], axes[one]
        return [tuple(axes)]
    if name == "permute":
        order: list[int] = list(call["dims"])
        return [tuple(axes[dim % count] for dim in order)]
    if name == "unsqueeze":
        axes.insert(call.dim("dim", count + 1), Symbol(1))
        return [tuple(axes)]
    if name == "expand":
        return [broadcast([tuple(axes)], call.shape())]
    given = call["dim"]
    dims = range(count) if given is None else [given] if isinstance(given, int) else given
    gone = {dim % count for dim in dims if axes[dim % count].size == 1}
    return [tuple(axis for dim, axis in enumerate(axes) if dim not in gone)]


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
def _matrix_product(call: Call) -> list[Axes]:
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}
    others = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec")}
    first, second = {**names, **others}.get(call.op.name, ("self", "tensor"))
    left, right = call.axes(first), call.axes(second)
    if len(right) == 1:
        unify(left[-1], right[0])
        made = left[:-1]
    else:
        for one, two in zip(left[:-2], right[:-2], strict=True):
            unify(one, two)
        unify(left[-1], right[-2])
        made = (*left[:-1], right[-1])
    if call.op.name.startswith(("addm", "badd")) and call.has("self"):
        made = broadcast([made, call.axes("self")], call.shape())
    return [made]


@rule("convolution")
def _convolution(call: Call) -> list[Axes]:
    data, weight, groups = call.axes("input"), call.axes("weight"), int(call["groups"])
    spatial = len(weight) - 2
    group = Symbol(groups)
    one, two = weight[0], weight[1]
    if call["transposed"]:
        unify(one, product([group, Symbol(one.size // groups)]))
        unify(data[-spatial - 1], one)
        made = product([group, two])
    else:
        unify(data[-spatial - 1], product([group, two]))
        unify(one, product([group, Symbol(one.size // groups)]))
        made = one
    if call.has("bias"):
        unify(made, call.axes("bias")[0])
    for axis in (*data[-spatial:], *weight[2:]):
        fix(axis, POSITIONS)
    shape = call.shape()
    places = (Symbol(size, POSITIONS) for size in shape[-spatial:])
    return [(*data[: -spatial - 1], made, *places)]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
      "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm")  # fmt: skip
def _batch_norm(call: Call) -> list[Axes]:
    axes = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            unify(axes[1], call.axes(name)[0])
    if not call.has("running_mean"):
        call.hidden.append(axes[1:2])
    return [axes]


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> list[Axes]:
    axes, count = call.axes("input"), len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call.has(name):
            for one, two in zip(axes[-count:], call.axes(name), strict=True):
                unify(one, two)
    call.hidden.append(axes[:-count])
    return [axes]


@rule("native_group_norm")
def _group_norm(call: Call) -> list[Axes]:
    axes, groups = call.axes("input"), int(call["group"])
    outer, _ = factored(axes[1], axes[1].size // groups)
    for name in ("weight", "bias"):
        if call.has(name):
            unify(axes[1], call.axes(name)[0])
    call.hidden.append((axes[0], outer))
    return [axes]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(call: Call) -> list[Axes]:
    axes = call.axes("self")
    dim = call.dim("dim", len(axes))
    call.hidden.append(axes[:dim] + axes[dim + 1 :])
    return [axes]


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "logsumexp",
      "linalg_vector_norm", "norm", "any", "all")  # fmt: skip
def _reduced(call: Call) -> list[Axes]:
    axes, given = call.axes("self"), call["dim"]
    dims = range(len(axes)) if given is None or given == [] else given
    gone = {dim % max(len(axes), 1) for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = [Symbol(1) if d in gone else axis for d, axis in enumerate(axes)]
    if not call["keepdim"]:
        kept = [axis for d, axis in enumerate(kept) if d not in gone]
    return [tuple(kept)] * len(call.op.outputs)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
      "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_cudnn_attention")  # fmt: skip
def _attention(call: Call) -> list[Axes]:
    queries, keys, values = (call.axes(name) for name in ("query", "key", "value"))
    for dim, axis in enumerate(queries[:-2]):
        for other in (keys[dim], values[dim]):
            if other.size == axis.size:
                unify(axis, other)
            else:  # queries share keys, those of one key side by side
                unify(axis, product([other, Symbol(axis.size // max(other.size, 1))]))
    unify(queries[-1], keys[-1])
    unify(keys[-2], values[-2])
    if call["is_causal"]:
        fix(queries[-2], "positions of a causal attention")
        fix(keys[-2], "positions of a causal attention")
    weighed = (*queries[:-1], keys[-2])
    mask = next((n for n in ("attn_mask", "attn_bias") if call.has(n)), None)
    if mask is not None:
        broadcast([weighed, call.axes(mask)], [axis.size for axis in weighed])
    call.hidden += [weighed, weighed[:-1]]
    return [(*queries[:-1], values[-1])]


@rule("embedding")
def _embedding(call: Call) -> list[Axes]:
    table = call.axes("weight")
    fix(table[0], _INDEXED)
    return [(*call.axes("indices"), table[1])]


@rule("index_select")
def _index_select(call: Call) -> list[Axes]:
    axes = list(call.axes("self"))
    dim = call.dim("dim", len(axes))
    fix(axes[dim], _INDEXED)
    axes[dim] = Symbol(call.shape()[dim], _INDEXED)
    return [tuple(axes)]


@rule("index")
def _index(call: Call) -> list[Axes]:
    axes, given = call.axes("self"), list(call["indices"])
    at = [dim for dim, index in enumerate(given) if index is not None]
    for dim in at:
        fix(axes[dim], _INDEXED)
    rest = [axis for dim, axis in enumerate(axes) if dim not in at]
    shape = call.shape()
    together = at == list(range(at[0], at[-1] + 1))
    front = at[0] if together else 0  # indices that stand apart put what they find first
    found = shape[front : front + len(shape) - len(rest)]
    made = (Symbol(size, _INDEXED) for size in found)
    return [(*rest[:front], *made, *rest[front:])]


@rule("roll", "flip", "cumsum")
def _in_order(call: Call) -> list[Axes]:
    axes = call.axes("self")
    given = call["dim"] if call.op.name == "cumsum" else call["dims"]
    for dim in [given] if isinstance(given, int) else given or range(len(axes)):
        fix(axes[dim], "is moved along or summed up in order")
    return [axes]


@rule("slice")
def _slice(call: Call) -> list[Axes]:
    axes, shape = list(call.axes("self")), call.shape()
    dim = call.dim("dim", len(axes))
    axis, size, step = axes[dim], shape[dim], int(call["step"] or 1)
    start = int(call["start"] or 0)
    start = min(max(start + axis.size if start < 0 else start, 0), axis.size)
    if step == 1:
        axes[dim] = cut(axis, [start, size, axis.size - start - size])[1]
    elif start < step and size * step == axis.size:  # every other unit: the same one of each pair
        axes[dim], inner = factored(axis, step)
        fix(inner, _PICKED)
    else:
        fix(axis, _PICKED)
        axes[dim] = Symbol(size, _PICKED)
    return [tuple(axes)]


@rule("select", "unbind")
def _select(call: Call) -> list[Axes]:
    axes = call.axes("self")
    dim = call.dim("dim", len(axes))
    fix(axes[dim], _PICKED)
    return [axes[:dim] + axes[dim + 1 :]] * len(call.op.outputs)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk")
def _split(call: Call) -> list[Axes]:
    axes = call.axes("self")
    dim = call.dim("dim", len(axes))
    pieces = cut(axes[dim], [value.tensor.shape[dim] for value in call.op.outputs])
    return [(*axes[:dim], piece, *axes[dim + 1 :]) for piece in pieces]


@rule("cat")
def _cat(call: Call) -> list[Axes]:
    given = [value for value in call.op.inputs if value.tensor.numel()]
    joined = [call.known(value) for value in given]
    dim = call.dim("dim", len(joined[0]))
    for axes in joined[1:]:
        for other, axis in enumerate(axes):
            if other != dim:
                unify(joined[0][other], axis)
    made = total([axes[dim] for axes in joined])
    return [(*joined[0][:dim], made, *joined[0][dim + 1 :])]


@rule("stack")
def _stack(call: Call) -> list[Axes]:
    joined = [call.known(value) for value in call.op.inputs]
    made = list(broadcast(joined, [axis.size for axis in joined[0]]))
    made.insert(call.dim("dim", len(made) + 1), Symbol(len(joined), _PICKED))
    return [tuple(made)]


@rule("constant_pad_nd")
def _pad(call: Call) -> list[Axes]:
    axes, pad = list(call.axes("self")), list(call["pad"])
    for place in range(len(pad) // 2):
        before, after = pad[2 * place], pad[2 * place + 1]
        axis = axes[-1 - place]
        if before < 0 or after < 0:
            fix(axis, _PICKED)
            axes[-1 - place] = Symbol(axis.size + before + after, _PICKED)
        elif before or after:
            axes[-1 - place] = total([Symbol(before), axis, Symbol(after)])
    return [tuple(axes)]


_POOLS = (
    "max_pool{}d_with_indices", "max_pool{}d", "avg_pool{}d", "_adaptive_avg_pool{}d",
    "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "upsample_nearest{}d", "_upsample_nearest{}d",
    "reflection_pad{}d", "replication_pad{}d", "mkldnn_max_pool{}d",
)  # fmt: skip


def _pooled(spatial: int) -> Rule:
    def pool(call: Call) -> list[Axes]:
        axes = call.known(call.op.inputs[0])
        for axis in axes[-spatial:]:
            fix(axis, POSITIONS)
        places = tuple(Symbol(size, POSITIONS) for size in call.shape()[-spatial:])
        return [(*axes[:-spatial], *places)] * len(call.op.outputs)

    return pool


for _spatial in (1, 2, 3):
    rule(*(name.format(_spatial) for name in _POOLS))(_pooled(_spatial))
rule("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa")(_pooled(2))
rule("upsample_linear1d")(_pooled(1))
