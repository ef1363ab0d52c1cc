"""Check: will these models merge? Weights always; activations too where data are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergewell.blocks import explain_not_finite
from mergewell.calibration.collect import OnStep, calibrate
from mergewell.calibration.data import Data
from mergewell.calibration.models import require_same
from mergewell.calibration.result import Calibration
from mergewell.descent.tasks import LearningTask
from mergewell.diagnostics.base import DIAGNOSTICS, Evidence, Finding, Level
from mergewell.diagnostics.m_loss import FAIR, POOR, layer_verdict
from mergewell.diagnostics.ops import (
    measure_matrices,
    measure_task_vectors,
    measure_top_conflicts,
)
from mergewell.errors import RecipeError
from mergewell.models.capture import LayerMLoss
from mergewell.models.loader import load_state
from mergewell.plan import Plan
from mergewell.prediction.predict import (
    METHODS,
    Prediction,
    own_tasks,
    predict_by_inputs,
    predict_by_weights,
)
from mergewell.report.results import Check, Cutoffs
from mergewell.report.results import LayerMLoss as LayerRow
from mergewell.statistics.task_vector_sums import TaskVectorSums


def check(
    plan: Plan,
    names: Sequence[str],
    *,
    data: Data | None = None,
    calibration: Calibration | None = None,
    deep: bool = False,
    tasks: Sequence[LearningTask] = (),
    methods: Sequence[Mapping[str, Any]] = METHODS,
    on_step: OnStep | None = None,
) -> Check:
    """Return whether the experts of a plan will merge; `names` are their short names.

    What takes long on large models (matrices decomposed, entries ranked) is done if `deep`.

    What the merge will keep is predicted from the weights, or from what all models answer on a few
    inputs of each expert's task: `tasks`, with heads, in the order of the experts, or `data` that
    say of each batch whose it is. Then a merge by each of the `methods` is made in memory.

    The plan's recipe says what "merged" means where M-Loss runs the merged model. What running the
    models shows is taken from `calibration`, if given, and else gathered on `data`, if given.

    Raises:
        RecipeError: the plan has no base.
        DataError: the calibration is of other models or another merge.
        UserError: checkpoints, models or data that do not fit one another.
    """
    if plan.base is None:
        raise RecipeError("A check compares experts with their base; name it with --base.")
    if calibration is not None:
        require_same(plan, calibration)
    sums = _weights(plan, on_step)
    if calibration is None and data is not None:
        calibration = calibrate(plan, data, on_step=on_step)
    layers = calibration.m_loss if calibration is not None else ()
    uncovered = dict(calibration.head.uncovered) if calibration is not None else {}
    evidence = Evidence(
        experts=tuple(names),
        products={name: found.products for name, found in sums.items()},
        conflict_mass={name: found.mass for name, found in sums.items()},
        conflict_pairs={name: found.pairs for name, found in sums.items()},
        sums={name: found.sums for name, found in sums.items()},
        sizes={name: plan.tasks[name].spec.numel for name in sums},
        layers=layers,
        **(_matrices(plan, on_step) if deep else {}),
        **_activations(calibration),
    )
    prediction = _prediction(plan, names, sums)
    own = tasks or (own_tasks(data) if data is not None else ())
    if prediction is not None and data is not None and len(own) == len(names):
        prediction = predict_by_inputs(
            plan, names, own, data.factory, methods=methods, on_step=on_step
        )
    asked = [DIAGNOSTICS.build(name, {}) for name in DIAGNOSTICS.names()]
    answers = [(one, one.measure(evidence)) for one in asked]
    unanswered = {
        one.component_name(): one.objection(evidence) or one.asks
        for one, finding in answers
        if finding is None
    }
    findings = [finding for _, finding in answers if finding is not None]
    deciding = [finding for one, finding in answers if finding is not None and one.decides]
    return Check(
        base=str(plan.base.path),
        experts=tuple(names),
        samples=calibration.seen if calibration is not None else None,
        mode=calibration.head.mode if calibration is not None else None,
        layers=tuple(layer_row(layer) for layer in layers),
        predictors=_flat(findings),
        prediction=prediction.as_data() if prediction is not None else None,
        verdict=_verdict(deciding, len(names)),
        level=_worst(deciding),
        uncovered=tuple(uncovered),
        uncovered_reasons=uncovered,
        findings=tuple(  # pyright: ignore[reportArgumentType]
            finding.as_data() | {"decides": one.decides}
            for one, finding in answers
            if finding is not None
        ),
        unanswered={name: why for name, why in unanswered.items() if why},
        unmeasured=dict(evidence.unmeasured),
        cutoffs=Cutoffs(fair=FAIR, poor=POOR),
    )


def _prediction(
    plan: Plan, names: Sequence[str], sums: Mapping[str, TaskVectorSums]
) -> Prediction | None:
    """Return what the merge will keep by its weights; nothing is expected where nothing moved."""
    moved = [s.products for s in sums.values() if bool((s.products.diagonal()[1:] > 0).any())]
    if len(names) < 2 or not moved:
        return None
    total = torch.stack(moved).sum(0)
    if not bool((total.diagonal()[1:] > 0).all()):
        return None
    return predict_by_weights(total, names, [one.coefficient for one in plan.recipe.experts])


def layer_row(layer: LayerMLoss) -> LayerRow:
    """Return one layer's M-Loss as the contract writes it, with its verdict in words."""
    theory = layer.theory
    return LayerRow.model_validate(
        {
            "layer": layer.layer,
            "activation": layer.activation,
            "nodes": layer.nodes,
            "absolute": layer.absolute,
            "relative": layer.relative,
            "node": layer.node.tolist(),
            "verdict": layer_verdict(layer.relative),
            "kind": layer.kind,
            "heads": [] if layer.heads is None else layer.heads.nan_to_num().tolist(),
            "mean_gap": _norm(layer.mean_gap) if theory else None,
            "expected_gap": _norm(theory.expected_gap) if theory else None,
            "bound": _norm(theory.bound) if theory else None,
            "ratio": theory.ratio if theory else None,
            "agreement": theory.agreement if theory else None,
        }
    )


def _norm(values: Tensor | None) -> float | None:
    return None if values is None else float(values.square().sum().sqrt())


def build_module(factory: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a new module with these weights."""
    module = factory()
    load_state(module, tensors)
    return module


def _weights(plan: Plan, on_step: OnStep | None) -> dict[str, TaskVectorSums]:
    found = measure_task_vectors(plan, on_progress=_progress(plan, "weights", on_step))
    for name, sums in found.items():
        if not bool(sums.products.isfinite().all()):
            explain_not_finite(plan, name)
    return found


def _progress(plan: Plan, step: str, on_step: OnStep | None) -> Callable[[int], None]:
    """Return what adds up the bytes of the weights that were read, and tells their sum."""
    total = sum(t.spec.nbytes for t in plan.tasks.values() if t.copied_from is None)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_step is not None:
            on_step(step, done, total)

    return progress


def _matrices(plan: Plan, on_step: OnStep | None) -> dict[str, Any]:
    """Return what takes long to find in the weights, by the evidence's names."""

    def progress(done: int, total: int) -> None:
        if on_step is not None:
            on_step("matrices", done, total)

    conflicts = measure_top_conflicts(plan, on_progress=_progress(plan, "ranks", on_step))
    matrices = measure_matrices(plan, on_progress=progress)
    return {
        "top_conflicts": conflicts,
        "subspaces": matrices.measured,
        "unmeasured": matrices.unmeasured,
    }


def _activations(calibration: Calibration | None) -> dict[str, Any]:
    """Return what diagnostics read of a calibration, by the evidence's names."""
    if calibration is None:
        return {}
    return {
        "output_gap": calibration.output_gap,
        "coefficients": calibration.head.coefficients,
        "features": calibration.features,
        "outputs": calibration.outputs,
    }


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
