"""Rules of linear maps, normalisations, reductions, poolings and attention."""

from __future__ import annotations

from mergewell.alignment.calls import Axes, Call, Rule, Rules, broadcast
from mergewell.alignment.symbols import Symbol, factored, fix, product, unify

MAPS = Rules()
POSITIONS = "positions of a convolution or a pooling"


@MAPS.of("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
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


@MAPS.of("convolution")
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


@MAPS.of("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
      "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm")  # fmt: skip
def _batch_norm(call: Call) -> list[Axes]:
    axes = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            unify(axes[1], call.axes(name)[0])
    if not call.has("running_mean"):
        call.hidden.append(axes[1:2])
    return [axes]


@MAPS.of("native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> list[Axes]:
    axes, count = call.axes("input"), len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call.has(name):
            for one, two in zip(axes[-count:], call.axes(name), strict=True):
                unify(one, two)
    call.hidden.append(axes[:-count])
    return [axes]


@MAPS.of("native_group_norm")
def _group_norm(call: Call) -> list[Axes]:
    axes, groups = call.axes("input"), int(call["group"])
    outer, _ = factored(axes[1], axes[1].size // groups)
    for name in ("weight", "bias"):
        if call.has(name):
            unify(axes[1], call.axes(name)[0])
    call.hidden.append((axes[0], outer))
    return [axes]


@MAPS.of("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(call: Call) -> list[Axes]:
    axes = call.axes("self")
    dim = call.dim("dim", len(axes))
    call.hidden.append(axes[:dim] + axes[dim + 1 :])
    return [axes]


@MAPS.of("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "logsumexp",
      "linalg_vector_norm", "norm", "any", "all")  # fmt: skip
def _reduced(call: Call) -> list[Axes]:
    axes, given = call.axes("self"), call["dim"]
    dims = range(len(axes)) if given is None or given == [] else given
    gone = {dim % max(len(axes), 1) for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = [Symbol(1) if d in gone else axis for d, axis in enumerate(axes)]
    if not call["keepdim"]:
        kept = [axis for d, axis in enumerate(kept) if d not in gone]
    return [tuple(kept)] * len(call.op.outputs)


@MAPS.of("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
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
    MAPS.of(*(name.format(_spatial) for name in _POOLS))(_pooled(_spatial))
MAPS.of("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa")(_pooled(2))
MAPS.of("upsample_linear1d")(_pooled(1))
