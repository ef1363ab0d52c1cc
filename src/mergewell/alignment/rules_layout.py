"""Rules of operations that move, cut, join or repeat elements and change none."""

from __future__ import annotations

from mergewell.alignment.calls import Axes, Call, Rules, broadcast
from mergewell.alignment.symbols import Symbol, cut, factored, fix, product, total, unify

LAYOUT = Rules()
_INDEXED = "is looked up by index"
_PICKED = "one of its entries is picked"


@LAYOUT.of("clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous")
def _same(call: Call) -> list[Axes]:
    return [call.known(value) for value in call.op.inputs[:1]]


@LAYOUT.of(
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
    "zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "zero", "fill",
    "empty_strided", "new_empty_strided",
)  # fmt: skip
def _uniform(_call: Call) -> list[Axes]:
    return []


@LAYOUT.of("view", "_unsafe_view", "_reshape_alias", "reshape")
def _reshape(call: Call) -> list[Axes]:
    made = tuple(Symbol(size) for size in call.shape())
    unify(product(made), product(call.axes("self")))
    return [made]


@LAYOUT.of("t", "transpose", "permute", "numpy_T", "squeeze", "unsqueeze", "expand")
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


@LAYOUT.of("embedding")
def _embedding(call: Call) -> list[Axes]:
    table = call.axes("weight")
    fix(table[0], _INDEXED)
    return [(*call.axes("indices"), table[1])]


@LAYOUT.of("index_select")
def _index_select(call: Call) -> list[Axes]:
    axes = list(call.axes("self"))
    dim = call.dim("dim", len(axes))
    fix(axes[dim], _INDEXED)
    axes[dim] = Symbol(call.shape()[dim], _INDEXED)
    return [tuple(axes)]


@LAYOUT.of("index")
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


@LAYOUT.of("roll", "flip", "cumsum")
def _in_order(call: Call) -> list[Axes]:
    axes = call.axes("self")
    given = call["dim"] if call.op.name == "cumsum" else call["dims"]
    for dim in [given] if isinstance(given, int) else given or range(len(axes)):
        fix(axes[dim], "is moved along or summed up in order")
    return [axes]


@LAYOUT.of("slice")
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


@LAYOUT.of("select", "unbind")
def _select(call: Call) -> list[Axes]:
    axes = call.axes("self")
    dim = call.dim("dim", len(axes))
    fix(axes[dim], _PICKED)
    return [axes[:dim] + axes[dim + 1 :]] * len(call.op.outputs)


@LAYOUT.of("split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk")
def _split(call: Call) -> list[Axes]:
    axes = call.axes("self")
    dim = call.dim("dim", len(axes))
    pieces = cut(axes[dim], [value.tensor.shape[dim] for value in call.op.outputs])
    return [(*axes[:dim], piece, *axes[dim + 1 :]) for piece in pieces]


@LAYOUT.of("cat")
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


@LAYOUT.of("stack")
def _stack(call: Call) -> list[Axes]:
    joined = [call.known(value) for value in call.op.inputs]
    made = list(broadcast(joined, [axis.size for axis in joined[0]]))
    made.insert(call.dim("dim", len(made) + 1), Symbol(len(joined), _PICKED))
    return [tuple(made)]


@LAYOUT.of("constant_pad_nd")
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


@LAYOUT.of("glu")
def _glu(call: Call) -> list[Axes]:
    axes = list(call.axes("self"))
    dim = call.dim("dim", len(axes))
    one, two = cut(axes[dim], [axes[dim].size // 2] * 2)
    unify(one, two)
    axes[dim] = one
    return [tuple(axes)]
