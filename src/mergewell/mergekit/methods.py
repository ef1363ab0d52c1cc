"""mergekit's merge methods: their parameters, defaults and what they are called here.

Source: mergekit 0.1.4 and 0.1.5 as installed from PyPI; `tests/parity` holds what they computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Base = Literal["required", "optional", "pair", "member", "none"]
"""What base_model is: a base that must or may be given, the first of the two models that are
merged, a model like the others, or nothing."""

Number = float | int
Default = Number | None


@dataclass(frozen=True, slots=True)
class Arguments:
    """mergekit's parameters for one tensor, as numbers."""

    shared: Mapping[str, Number]
    """Parameters of the merge."""

    each: Mapping[str, tuple[Number, ...]]
    """Parameters of the models, one number an expert."""

    based: bool
    """There is a base beside the experts."""

    def each_or_one(self, name: str) -> Number | tuple[Number, ...]:
        """Return one number an expert, or the one that all have."""
        values = self.each[name]
        return values[0] if len(set(values)) == 1 else values


Converted = tuple[str, dict[str, Any]]
"""A method's name and parameters, as a recipe says them."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One merge method of mergekit."""

    base: Base
    convert: Callable[[Arguments], Converted]
    shared: Mapping[str, Default] = field(default_factory=dict[str, Default])
    """Parameters of the merge and their defaults; None must be given."""

    each: Mapping[str, Default] = field(default_factory=dict[str, Default])
    """Parameters of a model and their defaults; None must be given."""

    experts: tuple[int, int] = (1, 1000)
    """Fewest and most models, a base that is not merged aside."""

    idle: tuple[str, ...] = ()
    """Parameters that are taken but change nothing, as in mergekit."""


def _divided(arguments: Arguments) -> float:
    """Return lambda, divided by the sum of the weights when that is asked for."""
    total = sum(arguments.each["weight"])
    divide = arguments.shared["normalize"] and abs(total) >= 1e-8
    return arguments.shared["lambda"] / (total if divide else 1)


def _densities(arguments: Arguments) -> float | tuple[float, ...]:
    """Return the densities; mergekit keeps everything at 1 and above."""
    values = tuple(min(1.0, value) for value in arguments.each["density"])
    return values[0] if len(set(values)) == 1 else values


def _summed(arguments: Arguments) -> dict[str, Any]:
    return {"combine": "sum", "divide": "none", "scale": _divided(arguments)}


def _elected(arguments: Arguments) -> dict[str, Any]:
    return {
        "combine": "agreeing",
        "votes": "weighted",
        "divide": "coefficients" if arguments.shared["normalize"] else "none",
        "scale": arguments.shared["lambda"],
    }


def _rescale(arguments: Arguments) -> dict[str, Any]:
    return {"rescale": "norm" if arguments.shared["rescale"] else "none"}


def _task_arithmetic(arguments: Arguments) -> Converted:
    return "task_arithmetic", {"scale": _divided(arguments)}


def _ties(arguments: Arguments) -> Converted:
    rescale = {"rescale": "norm"} if arguments.shared["rescale"] else {}
    return "ties", {"density": _densities(arguments), **rescale, **_elected(arguments)}


def _sparsified(
    method: str, combine: Callable[[Arguments], dict[str, Any]], *extra: str
) -> Callable[[Arguments], Converted]:
    def convert(arguments: Arguments) -> Converted:
        return method, {
            "density": _densities(arguments),
            **{name: arguments.each_or_one(name) for name in extra},
            **_rescale(arguments),
            **combine(arguments),
        }

    return convert


def _linear(arguments: Arguments) -> Converted:
    return "average", {"normalize": bool(arguments.shared["normalize"])}


def _slerp(arguments: Arguments) -> Converted:
    return "slerp", {"t": arguments.shared["t"]}


def _of(arguments: Arguments) -> dict[str, Any]:
    return {"of": "task_vectors"} if arguments.based else {}


def _nuslerp(arguments: Arguments) -> Converted:
    along = "column" if arguments.shared["nuslerp_row_wise"] else "row"
    flat = arguments.shared["nuslerp_flatten"]
    return "nuslerp", {"along": "tensor" if flat else along, **_of(arguments)}


def _multislerp(arguments: Arguments) -> Converted:
    return "multislerp", {
        "tangent": "projection",
        "normalize": bool(arguments.shared["normalize_weights"]),
        **_of(arguments),
    }


def _karcher(arguments: Arguments) -> Converted:
    shared = arguments.shared
    return "karcher", {"iterations": int(shared["max_iter"]), "tolerance": shared["tol"]}


def _nearswap(arguments: Arguments) -> Converted:
    return "nearswap", {"t": arguments.shared["t"]}


def _model_stock(arguments: Arguments) -> Converted:
    return "model_stock", {"scope": "row" if arguments.shared["filter_wise"] else "tensor"}


def _sce(arguments: Arguments) -> Converted:
    return "sce", {"density": min(1.0, arguments.shared["select_topk"]), "least": 1e-6}


def _arcee_fusion(arguments: Arguments) -> Converted:
    del arguments
    return "arcee_fusion", {}


def _ram(arguments: Arguments) -> Converted:
    return "ram", {"epsilon": arguments.shared["epsilon"]}


def _ram_plus(arguments: Arguments) -> Converted:
    shared = arguments.shared
    return "ram", {k: shared[k] for k in ("epsilon", "r", "alpha")} | {"plus": True}


def _passthrough(arguments: Arguments) -> Converted:
    if arguments.each["scale"] == (1.0,):
        return "keep", {"model": 1}
    return "average", {"normalize": False}


def _family(
    convert: Callable[[Arguments], Converted],
    *,
    normalize: bool = False,
    rescale: bool = False,
    extra: Mapping[str, Default] | None = None,
    idle: tuple[str, ...] = (),
) -> Peer:
    """Return a method of mergekit's task-arithmetic family."""
    return Peer(
        base="required",
        convert=convert,
        shared={"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False},
        each={"weight": None, "density": 1.0, **(extra or {})},
        idle=("int8_mask", *idle),
    )


_GAMMA, _EPSILON = {"gamma": 0.01}, {"epsilon": 0.15}

PEERS: Mapping[str, Peer] = {
    "linear": Peer("member", _linear, {"normalize": True}, {"weight": None}),
    "task_arithmetic": _family(_task_arithmetic, idle=("density", "rescale")),
    "ties": _family(_ties, normalize=True),
    "dare_linear": _family(_sparsified("dare", _summed), rescale=True),
    "dare_ties": _family(_sparsified("dare", _elected), rescale=True),
    "breadcrumbs": _family(_sparsified("breadcrumbs", _summed, "gamma"), extra=_GAMMA),
    "breadcrumbs_ties": _family(_sparsified("breadcrumbs", _elected, "gamma"), extra=_GAMMA),
    "della": _family(
        _sparsified("della", _elected, "epsilon"),
        normalize=True,
        rescale=True,
        extra=_EPSILON,
    ),
    "della_linear": _family(_sparsified("della", _summed, "epsilon"), rescale=True, extra=_EPSILON),
    "slerp": Peer("pair", _slerp, {"t": None}, experts=(2, 2)),
    "nuslerp": Peer(
        "optional",
        _nuslerp,
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        {"weight": None},
        experts=(2, 2),
    ),
    "multislerp": Peer(
        "optional",
        _multislerp,
        {"normalize_weights": True, "eps": 1e-8},
        {"weight": None},
        idle=("eps",),
    ),
    "karcher": Peer("member", _karcher, {"max_iter": 10, "tol": 1e-5}),
    "nearswap": Peer("pair", _nearswap, {"t": None}, experts=(2, 2)),
    "model_stock": Peer("required", _model_stock, {"filter_wise": False}, experts=(2, 1000)),
    "sce": Peer("required", _sce, {"select_topk": 1.0, "int8_mask": False}, idle=("int8_mask",)),
    "arcee_fusion": Peer("required", _arcee_fusion, experts=(1, 1)),
    "ram": Peer("required", _ram, {"epsilon": 1e-5}),
    "ramplus_tl": Peer("required", _ram_plus, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "passthrough": Peer("none", _passthrough, each={"scale": 1.0}, experts=(1, 1)),
}
"""mergekit's merge methods by name."""
