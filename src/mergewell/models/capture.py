"""Capture: run modules on unlabelled batches and hand their pre-activations to statistics.

Shapes: K experts, N samples, T tokens, O nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError, ModelError, RecipeError, did_you_mean
from mergewell.models.dataflow import Batch, call, evaluating, parts
from mergewell.models.trace import ActivatedLayer, Trace
from mergewell.statistics.base import State
from mergewell.statistics.m_loss import ActivationBatch, MLoss

Mode = Literal["merged", "pretrained", "own"]
"""Whose hidden state h a layer is fed: the merged model's, the base's, or each model's own."""


@dataclass(frozen=True, slots=True)
class LayerMLoss:
    """M-Loss of one layer; see `MLoss.value` for the definitions."""

    layer: str
    activation: str
    nodes: int
    absolute: float
    relative: float
    node: Tensor
    """Mean squared gap, [O], float64."""
    mean_gap: Tensor
    """Mean gap, [O], float64."""
    energy: Tensor
    """Mean squared activation of the ensemble, [O], float64."""


def measure_m_loss(
    experts: Sequence[nn.Module],
    trace: Trace,
    *,
    batches: Iterable[Batch],
    coefficients: Sequence[float] | None = None,
    mode: Mode = "merged",
    merged: nn.Module | None = None,
    base: nn.Module | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[LayerMLoss, ...]:
    """Return the M-Loss of every covered layer, in forward order.

    Modes `merged` and `pretrained` run one forward pass of the merged model or of the base; each
    expert's layer (and BatchNorm) is applied to the same h inside a hook. Mode `own` runs every
    model by itself and compares with the merged model's own activations; it holds one batch of all
    models' covered pre-activations. Padding is left out where the batch has an `attention_mask`
    [N, T] and the layer gives [N, T, O]. `coefficients` are 1/K unless given; `on_batch` is called
    with the number of batches done. The modules come back as they were.

    Source: papers.md 1.2 and 1.10. Raises:
        RecipeError: an unknown mode, no experts, or coefficients off the simplex.
        ModelError: the model that a mode needs is not given, or a model lacks a layer.
        DataError: no batch was given, or a gap is not finite.
    """
    if mode not in get_args(Mode):
        raise RecipeError(f"There is no M-Loss mode {mode!r}: {did_you_mean(mode, get_args(Mode))}")
    if not experts:
        raise RecipeError("M-Loss of no experts is not defined; name at least one expert.")
    reference, role = (base, "base") if mode == "pretrained" else (merged, "merged model")
    if reference is None:
        raise ModelError(f"M-Loss mode {mode!r} runs the {role}, which was not given; give it.")
    models = [("the " + role, reference)]
    models += [(f"expert {index + 1}", expert) for index, expert in enumerate(experts)]
    for name, model in models:
        _check_layers(name, model, trace)
    shares = coefficients if coefficients is not None else [1 / len(experts)] * len(experts)
    observe = _observe_own if mode == "own" else _observe_shared
    states: dict[str, State] = {layer.layer: {} for layer in trace.covered}
    done = 0
    with evaluating([reference, *experts]):
        for batch in batches:
            observe(reference, experts, trace, batch, shares, states)
            done += 1
            if on_batch is not None:
                on_batch(done)
    if not done:
        raise DataError("M-Loss was given no batches; give at least one sample of data.")
    return tuple(_finished(layer, states[layer.layer]) for layer in trace.covered)


def _observe_shared(
    reference: nn.Module,
    experts: Sequence[nn.Module],
    trace: Trace,
    batch: Batch,
    coefficients: Sequence[float],
    states: dict[str, State],
) -> None:
    """Run the reference; at each layer apply every expert's layer to the reference's h."""
    inside = False  # an expert may be the reference: its layers must not call the hook again

    def watch(layer: ActivatedLayer) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Any, _output: object) -> None:
            nonlocal inside
            if inside:
                return
            inside = True
            try:
                z = [pre_activation(expert, layer, args, kwargs) for expert in experts]
            finally:
                inside = False
            keep = _kept(batch, layer, z[0])
            observed = ActivationBatch(
                z, coefficients, layer.activation, node_dim=layer.node_dim, keep=keep
            )
            states[layer.layer] = MLoss().update(states[layer.layer], observed)

        return hook

    _run_hooked(reference, trace, batch, watch)


def _observe_own(
    reference: nn.Module,
    experts: Sequence[nn.Module],
    trace: Trace,
    batch: Batch,
    coefficients: Sequence[float],
    states: dict[str, State],
) -> None:
    """Run every model on its own path, then compare layer by layer."""
    seen = [_own_pre_activations(model, trace, batch) for model in (*experts, reference)]
    for layer in trace.covered:
        *z, merged = [by_layer.pop(layer.layer) for by_layer in seen]
        keep = _kept(batch, layer, merged)
        observed = ActivationBatch(
            z, coefficients, layer.activation, node_dim=layer.node_dim, merged=merged, keep=keep
        )
        states[layer.layer] = MLoss().update(states[layer.layer], observed)


def _own_pre_activations(model: nn.Module, trace: Trace, batch: Batch) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def watch(layer: ActivatedLayer) -> Any:
        def hook(_module: nn.Module, _args: object, _kwargs: object, output: Tensor) -> None:
            # a copy: the activation may overwrite the output
            seen[layer.layer] = _normalised(model, layer, output).clone()

        return hook

    _run_hooked(model, trace, batch, watch)
    return seen


def _run_hooked(
    model: nn.Module, trace: Trace, batch: Batch, watch: Callable[[ActivatedLayer], Any]
) -> None:
    """Run a model with a hook on every covered layer; the hooks are always removed."""
    with ExitStack() as hooks:
        for layer in trace.covered:
            module = model.get_submodule(layer.layer)
            handle = module.register_forward_hook(watch(layer), with_kwargs=True)
            hooks.callback(handle.remove)
        call(model, batch)


def pre_activation(
    model: nn.Module, layer: ActivatedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Return what a model's layer, and its BatchNorm if any, makes of a layer's arguments."""
    output = model.get_submodule(layer.layer)(*args, **kwargs)
    return _normalised(model, layer, output)


def _normalised(model: nn.Module, layer: ActivatedLayer, output: Tensor) -> Tensor:
    """Apply the BatchNorm's arithmetic; its module may hold an activation as well."""
    if layer.batch_norm is None:
        return output
    norm: Any = model.get_submodule(layer.batch_norm)
    mean, variance = norm.running_mean, norm.running_var
    return functional.batch_norm(output, mean, variance, norm.weight, norm.bias, False, 0, norm.eps)


def _kept(batch: Batch, layer: ActivatedLayer, z: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or layer.node_dim != -1 or z.shape[:-1] != mask.shape:
        return None
    return mask.to(torch.bool)


def _check_layers(name: str, model: nn.Module, trace: Trace) -> None:
    known = {module for module, _ in parts(model)}
    for layer in trace.covered:
        for wanted in (layer.layer, layer.batch_norm or ""):
            if wanted not in known:
                raise ModelError(
                    f"{name[0].upper()}{name[1:]} has no layer {wanted!r}: build every model from "
                    "the source that was traced."
                )


def _finished(layer: ActivatedLayer, state: State) -> LayerMLoss:
    value = MLoss().value(state)
    if not all(bool(part.isfinite().all()) for part in value.values()):
        raise DataError(
            f"Layer {layer.layer}: the activations of some model are not finite (NaN or infinite) "
            "on the data; check the models and the data for values out of range."
        )
    return LayerMLoss(
        layer.layer,
        layer.activation.name,
        layer.nodes,
        float(value["absolute"]),
        float(value["relative"]),
        value["node"],
        value["mean_gap"],
        value["energy"],
    )
