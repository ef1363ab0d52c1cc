"""The output gap: how far the merged model ends up from the ensemble, after all layers.

Shapes: K experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.models.dataflow import Batch, call, evaluating, tensors


def output_gap(
    experts: Sequence[nn.Module],
    merged: nn.Module,
    *,
    batches: Iterable[Batch],
    coefficients: Sequence[float],
) -> float:
    """Return ||f(merged) - sum_j c_j f(expert_j)|| / ||sum_j c_j f(expert_j)|| over all batches.

    f is the module's first output. Layer M-Loss looks at one layer at a time; this is what their
    gaps add up to. Coefficients are on the simplex. Padding counts, since f may be pooled.

    Source: papers.md 1.2.3, the variant "without merge", at the network's end.

    Raises:
        ModelError: a module returns no tensor.
    """
    gap = energy = 0.0
    with evaluating([merged, *experts]):
        for batch in batches:
            own = [_first(call(expert, batch), expert) for expert in experts]
            ensemble = own[0]
            for coefficient, output in zip(coefficients[1:], own[1:], strict=True):
                ensemble = ensemble + coefficient * (output - own[0])
            difference = _first(call(merged, batch), merged) - ensemble
            gap += float(difference.double().square().sum())
            energy += float(ensemble.double().square().sum())
    return (gap / energy) ** 0.5 if energy > 0 else 0.0


def _first(output: object, module: nn.Module) -> Tensor:
    found = tensors(output)
    if not found:
        raise ModelError(f"{type(module).__name__} returns no tensor; wrap it so that it does.")
    return found[0].float()
