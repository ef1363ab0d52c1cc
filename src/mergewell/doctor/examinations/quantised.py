"""Weights that were quantised: codes and scales that no merge may average."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from mergewell.doctor.examinations.base import Examination, Trouble, named
from mergewell.doctor.patient import Model, Patient

_PARTS = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|absmax|quant_map|SCB"
    r"|(weight\.)?quant_state\..*|_packed_params.*)$"
)


class Quantised(Examination):
    """Quantised weights (GPTQ, AWQ, bitsandbytes, FP8), whose codes cannot be averaged."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each model that says so in `config.json`, or whose tensors show it."""
        for model in patient.models:
            codes = _codes(model)
            method = _method(model.checkpoint.config)
            if not codes and not method:
                continue
            by = f" ({method})" if method else ""
            shown = f"as {named(codes)} show" if codes else "as its config.json says"
            yield Trouble(
                "garbage",
                f"{model.name}: its weights are quantised{by}, {shown}, and codes cannot be merged;"
                " take the model as it was before, or write it out in bfloat16.",
                model.name,
                tuple(codes[:3]),
            )


def _codes(model: Model) -> list[str]:
    specs = model.checkpoint.specs
    return [
        name
        for name, spec in specs.items()
        if _PARTS.search(name)
        or (spec.dtype.itemsize == 1 and spec.dtype.is_floating_point)
        or (name.endswith(".weight") and len(spec.shape) > 1 and not spec.dtype.is_floating_point)
    ]


def _method(config: Mapping[str, Any] | None) -> str:
    found: object = (config or {}).get("quantization_config")
    if not isinstance(found, dict):
        return ""
    return str(cast("dict[str, Any]", found).get("quant_method", "unnamed"))
