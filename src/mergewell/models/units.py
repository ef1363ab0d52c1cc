"""Unit: one place in a network where merging and ensembling can part.

Two families. Pointwise units (`activation`, `gated`) are linear maps of one shared input h followed
by pointwise functions, multiplied where there are two. Module units (`attention`, `norm`, `block`,
`output`) are whole modules on a shared input.

Shapes: N samples, O nodes, I inputs of a node, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mergewell.errors import ModelError, RecipeError, did_you_mean
from mergewell.models.activation import IDENTITY, Activation
from mergewell.models.dataflow import tensors

Kind = Literal["activation", "gated", "attention", "norm", "block", "output"]
"""What a unit is; see `Unit`."""

CHEAP: tuple[Kind, ...] = ("activation", "gated")
"""Kinds that cost each expert its layer alone; the others cost a forward pass of whole modules."""

Calls = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments of one call of a module."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the nodes of a unit stand in a parameter: node i at `start + i * step` along `dim`."""

    parameter: str
    dim: int
    start: int = 0
    step: int = 1


@dataclass(frozen=True, slots=True)
class Branch:
    """A linear layer or convolution and the pointwise function of its output."""

    layer: str
    """Name of the module that holds the weights."""

    batch_norm: str | None
    """Name of the BatchNorm between layer and function, if there is one."""

    activation: Activation

    rows: Rows
    """Where the nodes stand in the layer's weight."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A place where the mean of the experts' outputs can differ from the merged model's.

    - `activation`: a linear layer or convolution, its BatchNorm if any, and what follows pointwise
    - `gated`: two such branches on one input, multiplied (SwiGLU, GeGLU, ReGLU; also one fused
      layer that is split); node i is the pair of rows
    - `attention`: a module that holds an attention and its projections
    - `norm`: a normalisation with parameters
    - `block`: one of the repeated modules of a list
    - `output`: the whole model, hence every model on its own path
    """

    name: str
    """The module whose call is observed, of `gated` units the gate's; `(output)` for the output."""

    kind: Kind

    parameters: tuple[str, ...]
    """Names of the parameters that it owns."""

    nodes: int
    """Number of nodes, O."""

    node_dim: int
    """Dimension of its output that counts the nodes: -1, or 1 for convolutions."""

    branches: tuple[Branch, ...] = ()
    """Of pointwise units: the layer, or the gate and what it multiplies."""

    heads: int = 0
    """Number of heads, H, of an attention whose split was found; else 0."""

    head_module: str = ""
    """The output projection, whose input is the heads' values one after the other."""

    @property
    def module(self) -> str:
        """Name of the module whose call is observed; empty for the whole model."""
        return "" if self.kind == "output" else self.name

    @property
    def layer(self) -> str:
        """The unit's name, as the contract calls it."""
        return self.name

    @property
    def batch_norm(self) -> str | None:
        """The BatchNorm of the first branch."""
        return self.branches[0].batch_norm if self.branches else None

    @property
    def activation(self) -> Activation:
        """The function of the first branch; the identity for module units."""
        return self.branches[0].activation if self.branches else IDENTITY

    @property
    def label(self) -> str:
        """What a table shows under "activation": the function's name, or the kind."""
        if self.kind == "activation":
            return self.activation.name
        return _GLU.get(self.activation.name, "gated") if self.kind == "gated" else self.kind

    def pre_activations(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Return each branch's linear output for the module's arguments, [N, ..., O, ...]."""
        made: dict[str, Tensor] = {}
        for branch in self.branches:
            if branch.layer not in made:
                made[branch.layer] = model.get_submodule(branch.layer)(*args, **kwargs)
        return self.split(model, made)

    def split(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return each branch's part of its layer's output, after its BatchNorm."""
        return tuple(
            self._selected(branch, normalised(model, branch.batch_norm, outputs[branch.layer]))
            for branch in self.branches
        )

    def _selected(self, branch: Branch, z: Tensor) -> Tensor:
        start, step = branch.rows.start, branch.rows.step
        if start == 0 and step == 1 and z.shape[self.node_dim] == self.nodes:
            return z
        index = [slice(None)] * z.ndim
        index[self.node_dim] = slice(start, start + (self.nodes - 1) * step + 1, step)
        return z[tuple(index)]

    def function(self, *pre_activations: Tensor) -> Tensor:
        """Return the product of the branches' functions of their pre-activations."""
        pairs = zip(self.branches, pre_activations, strict=True)
        return prod_of([branch.activation(z) for branch, z in pairs])

    def contribution(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Return what one model's unit makes of the module's arguments."""
        if self.branches:
            return self.function(*self.pre_activations(model, args, kwargs))
        return self.run(model, args, kwargs)[0]

    def run(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        state: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return a module unit's output and the heads' values, [N, ..., H * d], where known.

        `state` replaces the module's parameters and buffers, by their names inside the module.
        """
        part = model.get_submodule(self.module)
        seen: list[Tensor] = []
        handle = self.watch_heads(model, seen)
        try:
            if state is None:
                result = part(*args, **kwargs)
            else:
                result = functional_call(part, dict(state), tuple(args), dict(kwargs))
        finally:
            if handle is not None:
                handle.remove()
        return self.first(result), seen[0] if seen else None

    def watch_heads(self, model: nn.Module, seen: list[Tensor]) -> Any:
        """Hook the output projection so that its input goes to `seen`; None where not known."""
        if not self.heads:
            return None

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])

        return model.get_submodule(self.head_module).register_forward_pre_hook(hook)

    def first(self, result: object) -> Tensor:
        """Return the first tensor that a module returned.

        Raises:
            ModelError: there is none.
        """
        found = tensors(result)
        if not found:
            raise ModelError(
                f"{self.name} returns no tensor; leave {self.kind!r} out of the kinds."
            )
        return found[0]

    def averaged(
        self, models: Sequence[nn.Module], coefficients: Sequence[float]
    ) -> dict[str, Tensor]:
        """Return the module's mean parameters and buffers, by their names inside the module.

        Written p_0 + sum_j c_j (p_j - p_0), so that equal models give their parameters bitwise.
        Integer buffers are the first model's.
        """
        modules = [model.get_submodule(self.module) for model in models]
        states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in modules]
        result: dict[str, Tensor] = {}
        for name, first in states[0].items():
            mean = first.detach()
            if mean.is_floating_point():
                mean = mean.clone()
                for share, other in zip(coefficients[1:], states[1:], strict=True):
                    mean.add_(other[name].detach() - first.detach(), alpha=share)
            result[name] = mean
        return result

    def matrices(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Return each branch's weight as [O, I], a view where the layout allows.

        BatchNorm is left out: it scales rows and does not mix them.
        """
        result: list[Tensor] = []
        for branch in self.branches:
            rows = branch.rows
            weight = model.get_parameter(rows.parameter).detach().movedim(rows.dim, 0)
            stop = rows.start + (self.nodes - 1) * rows.step + 1
            result.append(weight[rows.start : stop : rows.step].flatten(1))
        return tuple(result)


_GLU = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_tanh": "geglu_tanh",
    "relu": "reglu",
    "sigmoid": "glu",
    "identity": "bilinear",
}


def checked_kinds(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Return the kinds as they are.

    Raises:
        RecipeError: there is no such kind.
    """
    for kind in kinds:
        if kind not in get_args(Kind):
            raise RecipeError(
                f"There is no M-Loss unit of kind {kind!r}: "
                f"{did_you_mean(kind, cast('tuple[str, ...]', get_args(Kind)))}"
            )
    return tuple(kinds)


def normalised(model: nn.Module, batch_norm: str | None, z: Tensor) -> Tensor:
    """Apply a BatchNorm's arithmetic alone; its module may hold an activation as well."""
    if batch_norm is None:
        return z
    norm: Any = model.get_submodule(batch_norm)
    mean, variance = norm.running_mean, norm.running_var
    return functional.batch_norm(z, mean, variance, norm.weight, norm.bias, False, 0, norm.eps)


def prod_of(factors: Sequence[Tensor]) -> Tensor:
    """Return the product of one or more tensors."""
    return factors[0] if len(factors) == 1 else prod(factors[1:], start=factors[0])
