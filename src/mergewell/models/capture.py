"""Capture: run modules on unlabelled batches and hand what units make to statistics.

Shapes: K experts, N samples, T tokens, O nodes, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mergewell.errors import DataError, ModelError, RecipeError, did_you_mean
from mergewell.models.dataflow import Batch, call, evaluating, parts
from mergewell.models.observe import HEADS, Averages, observing, part_of
from mergewell.models.own_path import OwnPaths
from mergewell.models.trace import Trace
from mergewell.models.units import CHEAP, Kind, Unit, checked_kinds
from mergewell.statistics.base import State
from mergewell.statistics.m_loss import MLoss
from mergewell.statistics.m_loss_theory import Theory, theory_of

Mode = Literal["merged", "pretrained", "mean", "own"]
"""Whose hidden state h a unit is fed: the merged model's, the base's, the plain average's, or each
model's own."""

_ROLES: Mapping[str, str] = {
    "merged": "merged model",
    "pretrained": "base",
    "mean": "average model",
    "own": "merged model",
}


@dataclass(frozen=True, slots=True)
class LayerMLoss:
    """M-Loss of one unit; see `MLoss.value` for the definitions."""

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
    kind: Kind = "activation"
    parameters: tuple[str, ...] = ()
    """Names of the parameters that the unit owns."""
    observations: float = 1.0
    """Number of observations (samples times positions) that counted."""
    heads: Tensor | None = None
    """Relative M-Loss of each head's values before the output projection, [H], float64."""
    theory: Theory | None = None
    """What a Gaussian model expects and what bounds allow; None where it has no say."""


def measure_m_loss(
    experts: Sequence[nn.Module],
    trace: Trace,
    *,
    batches: Iterable[Batch],
    coefficients: Sequence[float] | None = None,
    mode: Mode = "merged",
    merged: nn.Module | None = None,
    base: nn.Module | None = None,
    average: nn.Module | None = None,
    kinds: Sequence[Kind] = CHEAP,
    merged_layers: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[LayerMLoss, ...]:
    """Return the M-Loss of every unit of the wanted kinds, in forward order.

    Modes `merged`, `pretrained` and `mean` run one forward pass of the merged model, the base or
    the `average`; each expert's unit is applied to the same h inside a hook. Mode `own` runs every
    model by itself and compares with the merged model's own; it holds one batch of all models'
    units. The merged side of the other modes is the mean of the experts' pre-activations (of module
    units: the module with mean parameters) or, with `merged_layers`, what the merged model's own
    layers make of h; the unit `output` compares with the merged model wherever there is one.
    Padding is left out where the batch has an `attention_mask` [N, T] and the unit gives [N, T, O].
    `coefficients` are 1/K unless given; `on_batch` is called with the number of batches done. The
    modules come back as they were.

    Source: papers.md 1.2 and 1.10. Raises:
        RecipeError: an unknown mode or kind, no experts, or coefficients off the simplex.
        ModelError: the model that a mode needs is not given, or a model lacks a layer.
        DataError: no batch was given, or a gap is not finite.
    """
    if mode not in get_args(Mode):
        raise RecipeError(f"There is no M-Loss mode {mode!r}: {did_you_mean(mode, get_args(Mode))}")
    if not experts:
        raise RecipeError("M-Loss of no experts is not defined; name at least one expert.")
    units = trace.of(checked_kinds(kinds))
    reference = {"pretrained": base, "mean": average}.get(mode, merged)
    if reference is None:
        raise ModelError(
            f"M-Loss mode {mode!r} runs the {_ROLES[mode]}, which was not given; give it."
        )
    if merged_layers and merged is None:
        raise ModelError("M-Loss of merged layers needs the merged model; give it.")
    models = [(f"the {_ROLES[mode]}", reference)]
    models += [(f"expert {index + 1}", expert) for index, expert in enumerate(experts)]
    if merged_layers and merged is not None and merged is not reference:
        models.append(("the merged model", merged))
    for name, model in models:
        _check_layers(name, model, units)
    shares = coefficients if coefficients is not None else [1 / len(experts)] * len(experts)
    averages = Averages(experts, shares)
    states: dict[str, State] = {unit.name: {} for unit in units}
    (merged_name, _), *others = models
    own = OwnPaths([name for name, _ in others[: len(experts)]], merged_name, shares, states)
    done = 0
    with evaluating([model for _, model in models]):
        for batch in batches:
            if mode == "own":
                for name, model in models:
                    with own.watching(name, model, units):
                        call(model, batch)
                own.compare(units, batch)
            else:
                with observing(
                    reference,
                    experts,
                    units,
                    batch,
                    coefficients=shares,
                    states=states,
                    merged=merged if merged_layers else None,
                    final=merged,
                    averages=averages,
                ):
                    call(reference, batch)
            done += 1
            if on_batch is not None:
                on_batch(done)
    if not done:
        raise DataError("M-Loss was given no batches; give at least one sample of data.")
    return tuple(finished(unit, states[unit.name]) for unit in units)


def _check_layers(name: str, model: nn.Module, units: Sequence[Unit]) -> None:
    known = {module for module, _ in parts(model)}
    for unit in units:
        layers = [n for b in unit.branches for n in (b.layer, b.batch_norm) if n]
        for wanted in (unit.module, *layers):
            if wanted not in known:
                raise ModelError(
                    f"{name[0].upper()}{name[1:]} has no layer {wanted!r}: build every model from "
                    "the source that was traced."
                )


def finished(unit: Unit, state: State) -> LayerMLoss:
    """Return a unit's M-Loss from its state, with what theory says of it.

    Raises:
        DataError: no observation was counted, or some model's activations were not finite.
    """
    plain = part_of(state, "")
    value = MLoss().value(plain)
    if not all(bool(part.isfinite().all()) for part in value.values()):
        raise DataError(
            f"Layer {unit.name}: the activations of some model are not finite (NaN or infinite) "
            "on the data; check the models and the data for values out of range."
        )
    by_head = part_of(state, HEADS)
    heads = None
    if by_head and unit.heads:
        gap, energy = (
            by_head[key].view(unit.heads, -1).sum(1) for key in ("gap_squared", "ensemble_squared")
        )
        heads = torch.where(energy > 0, (gap / energy).sqrt(), (gap > 0).to(torch.float64))
    laws = [branch.activation for branch in unit.branches]
    return LayerMLoss(
        unit.name,
        unit.label,
        unit.nodes,
        float(value["absolute"]),
        float(value["relative"]),
        value["node"],
        value["mean_gap"],
        value["energy"],
        unit.kind,
        unit.parameters,
        float(plain["observations"]),
        heads,
        theory_of(plain, [(law.name, law, law.slope) for law in laws]),
    )


def pooled(layers: Iterable[LayerMLoss]) -> float:
    """Return the relative M-Loss of several units together: of a block, or of a whole model.

    sqrt(sum gap^2 / sum ensemble^2) over all their nodes and observations; 0 without units. Units
    with large outputs weigh most, so that kinds are best not mixed.
    """
    gap = energy = 0.0
    for layer in layers:
        gap += layer.observations * float(layer.node.sum())
        energy += layer.observations * float(layer.energy.sum())
    return (gap / energy) ** 0.5 if energy > 0 else float(gap > 0)
