"""Check: will these models merge? Weights always; activations too where data are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from mergewell.blocks import explain_not_finite
from mergewell.diagnostics.base import DIAGNOSTICS, Evidence, Finding, Level
from mergewell.diagnostics.m_loss import FAIR, POOR, layer_verdict
from mergewell.engines.base import one_thread_a_worker
from mergewell.errors import RecipeError
from mergewell.models.capture import LayerMLoss, Mode, measure_m_loss
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state
from mergewell.models.output_gap import output_gap
from mergewell.models.trace import trace
from mergewell.plan import Plan
from mergewell.report.results import Check, Cutoffs
from mergewell.report.results import LayerMLoss as LayerRow
from mergewell.run import Values, measure_weights, merge_tensors
from mergewell.statistics.inner_products import InnerProducts
from mergewell.statistics.sign_conflict import SignConflict
from mergewell.storage.base import Checkpoint

_PRODUCTS = InnerProducts(of="base_and_task_vectors")
_CONFLICT = SignConflict()

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it and what there is to do."""


@dataclass(frozen=True, slots=True)
class Data:
    """Unlabelled inputs and the architecture that takes them."""

    factory: Callable[[], nn.Module]
    """Makes a module in eval mode, with whatever weights."""

    batches: Sequence[Batch]
    samples: int
    mode: Mode = "merged"


def check(
    plan: Plan,
    names: Sequence[str],
    *,
    data: Data | None = None,
    on_step: OnStep | None = None,
) -> Check:
    """Return whether the experts of a plan will merge; `names` are their short names.

    The plan's recipe says what "merged" means where M-Loss runs the merged model.

    Raises:
        RecipeError: the plan has no base.
        UserError: checkpoints, models or data that do not fit one another.
    """
    if plan.base is None:
        raise RecipeError("A check compares experts with their base; name it with --base.")
    values = _weights(plan, on_step)
    seen = _Seen()
    if data is not None:
        with one_thread_a_worker():
            seen = _activations(plan, plan.base, data, on_step)
    evidence = Evidence(
        experts=tuple(names),
        products={name: value[_PRODUCTS]["products"] for name, value in values.items()},
        conflict_mass={name: value[_CONFLICT]["mass"] for name, value in values.items()},
        conflict_pairs={name: value[_CONFLICT]["pairs"] for name, value in values.items()},
        layers=seen.layers,
        output_gap=seen.output_gap,
    )
    findings = [
        finding
        for name in DIAGNOSTICS.names()
        if (finding := DIAGNOSTICS.build(name, {}).measure(evidence)) is not None
    ]
    return Check(
        base=str(plan.base.path),
        experts=tuple(names),
        samples=data.samples if data is not None else None,
        mode=data.mode if data is not None else None,
        layers=tuple(layer_row(layer) for layer in seen.layers),
        predictors=_flat(findings),
        verdict=_verdict(findings, len(names)),
        level=_worst(findings),
        uncovered=tuple(seen.uncovered),
        uncovered_reasons=dict(seen.uncovered),
        findings=tuple(finding.as_data() for finding in findings),  # pyright: ignore[reportArgumentType]
        cutoffs=Cutoffs(fair=FAIR, poor=POOR),
    )


def layer_row(layer: LayerMLoss) -> LayerRow:
    """Return one layer's M-Loss as the contract writes it, with its verdict in words."""
    return LayerRow.model_validate(
        {
            "layer": layer.layer,
            "activation": layer.activation,
            "nodes": layer.nodes,
            "absolute": layer.absolute,
            "relative": layer.relative,
            "node": layer.node.tolist(),
            "verdict": layer_verdict(layer.relative),
        }
    )


def build_module(factory: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a new module with these weights."""
    module = factory()
    load_state(module, tensors)
    return module


def _weights(plan: Plan, on_step: OnStep | None) -> dict[str, Values]:
    total = sum(t.spec.nbytes for t in plan.tasks.values() if t.copied_from is None)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_step is not None:
            on_step("weights", done, total)

    values = measure_weights(plan, (_PRODUCTS, _CONFLICT), on_progress=progress)
    for name, value in values.items():
        if not bool(value[_PRODUCTS]["products"].isfinite().all()):
            explain_not_finite(plan, name)
    return values


@dataclass(frozen=True, slots=True)
class _Seen:
    """What running the models showed."""

    layers: tuple[LayerMLoss, ...] = ()
    uncovered: Mapping[str, str] = field(default_factory=dict[str, str])
    output_gap: float | None = None


def _activations(plan: Plan, base_weights: Checkpoint, data: Data, on_step: OnStep | None) -> _Seen:
    """Run base, merged model and experts on the data."""
    experts = [build_module(data.factory, expert) for expert in plan.experts]
    base = data.factory()
    left_out = load_state(base, base_weights).left_out
    merged = build_module(data.factory, dict(merge_tensors(plan)))
    coefficients = _simplex([expert.coefficient for expert in plan.recipe.experts])
    total = 2 * len(data.batches)

    def progress(done: int) -> None:
        if on_step is not None:
            on_step("activations", done, total)

    traced = trace(base, first_samples(data.batches))
    layers = measure_m_loss(
        experts,
        traced,
        batches=data.batches,
        coefficients=coefficients,
        mode=data.mode,
        merged=merged,
        base=base,
        on_batch=progress,
    )
    gap = output_gap(experts, merged, batches=data.batches, coefficients=coefficients)
    progress(total)
    absent = dict.fromkeys(left_out, "not a part of the module that was built from these weights")
    return _Seen(layers, {**traced.uncovered, **absent}, gap)


def _simplex(coefficients: Sequence[float]) -> list[float]:
    """Return the coefficients divided by their sum; equal ones where they cannot be."""
    if min(coefficients) < 0 or sum(coefficients) <= 0:
        return [1 / len(coefficients)] * len(coefficients)
    return [coefficient / sum(coefficients) for coefficient in coefficients]


def first_samples(batches: Sequence[Batch], count: int = 2) -> Batch:
    """Return the first samples of the first batch, enough to trace a module."""
    first = batches[0]
    if isinstance(first, Tensor):
        return first[:count]
    return {name: tensor[:count] for name, tensor in first.items()}


def short_names(paths: Iterable[str]) -> tuple[str, ...]:
    """Return a short name for each path: the shortest endings that tell them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{'/'.join(p)}#{i}" for i, p in enumerate(parts, 1)]
    return tuple(n.removesuffix(".safetensors").removesuffix(".task_vector") for n in names)


def _flat(findings: Sequence[Finding]) -> dict[str, float | tuple[tuple[float | None, ...], ...]]:
    """Return the predictors of all findings; a number an expert becomes one named number each."""
    flat: dict[str, float | tuple[tuple[float | None, ...], ...]] = {}
    for finding in findings:
        for name, value in finding.predictors.items():
            if isinstance(value, Mapping):
                each = cast("Mapping[str, float]", value)
                flat |= {f"{name}:{expert}": number for expert, number in each.items()}
            else:
                flat[name] = value
    return flat


_ORDER = {"good": 0, "fair": 1, "poor": 2}


def _worst(findings: Sequence[Finding]) -> Level:
    return max((finding.level for finding in findings), key=_ORDER.__getitem__)


def _verdict(findings: Sequence[Finding], experts: int) -> str:
    """Return the verdict in one sentence, with its reason; no accuracy is promised."""
    opening = {
        "good": f"These {experts} experts look mergeable",
        "fair": f"These {experts} experts can be merged with some loss",
        "poor": f"Expect a plain merge of these {experts} experts to lose much",
    }
    # diagnostics stand in the order of their names; the worst speaks, of equals the output gap
    deciding = max(findings, key=lambda f: (_ORDER[f.level], "output_gap" in f.predictors))
    reason = deciding.verdict[0].lower() + deciding.verdict[1:]
    return f"{opening[deciding.level]}: {reason}"
