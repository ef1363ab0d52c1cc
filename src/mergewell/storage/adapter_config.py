"""adapter_config.json: what PEFT says of a LoRA adapter, read so that nothing is passed over.

What changes the weights in a way that is not understood is refused by name; what only matters in
training is left alone; a key that is not known is refused unless it is off. `new_config` makes the
configuration of an adapter that is extracted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mergewell.errors import CheckpointError
from mergewell.storage.strict_json import read_object

ADAPTER_CONFIG = "adapter_config.json"

_UNDERSTOOD = frozenset(
    {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
     "fan_in_fan_out", "peft_type", "init_lora_weights", "base_model_name_or_path"}
)  # fmt: skip

_OF_TRAINING = frozenset(
    {"auto_mapping", "bias", "ensure_weight_tying", "eva_config", "exclude_modules",
     "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
     "corda_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size",
     "revision", "runtime_config", "target_modules", "task_type", "velora_config"}
)  # fmt: skip
"""Without effect on trained weights, or shown by the tensors themselves (bias, modules_to_save).

The configurations of initialisations are off unless `init_lora_weights` names these.
"""

_REASONS = {
    "alora_invocation_tokens": "it acts on some tokens only, so it is no change of the weights",
    "arrow_config": "it routes between adapters, so it is no change of the weights",
    "kasa_config": "it cuts the base's own weights",
    "layer_replication": "it repeats layers of the base",
    "lora_ga_config": "it changes the base's own weights at the start",
    "target_parameters": "its factors belong to bare parameters, such as stacked experts",
    "trainable_token_indices": "it holds single rows of an embedding",
}

_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Those that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ take a part out of it."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What of an adapter's configuration bears on its weights."""

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    """Scale by alpha / sqrt(rank) in place of alpha / rank (arXiv:2312.03732)."""
    fan_in_fan_out: bool
    """The base stores its matrices as [inputs, outputs], as GPT-2 does."""
    dora: bool
    base_name: str | None
    """What the adapter was trained on, as PEFT names it."""

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor on B A for a module whose factors have this rank.

        Raises:
            CheckpointError: the configuration gives the module another rank.
        """
        due = _value_for(self.rank_pattern, module, self.rank)
        if due != rank:
            raise CheckpointError(
                f"{self.path} gives {module} the rank {due}, but its factors have {rank}; "
                "save the adapter again."
            )
        alpha = _value_for(self.alpha_pattern, module, self.alpha)
        return float(alpha / rank**0.5 if self.rslora else alpha / rank)


def read_settings(path: Path) -> AdapterSettings:
    """Return what an adapter's configuration says.

    Raises:
        CheckpointError: no JSON, no LoRA, a wrong value, or a variant that is not supported.
    """
    data = read_object(path, remedy="download or save the adapter again")
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: adapters of kind {kind!r} are not supported, only 'LORA'; fold it into its "
            "base with peft (merge_and_unload) first."
        )
    _refuse_variants(data, path)
    patterns = [_pattern(data, key, path) for key in ("rank_pattern", "alpha_pattern")]
    name = data.get("base_model_name_or_path")
    return AdapterSettings(
        path=path,
        rank=int(_number(data.get("r"), "r", path)),
        alpha=_number(data.get("lora_alpha"), "lora_alpha", path),
        rank_pattern={key: int(value) for key, value in patterns[0].items()},
        alpha_pattern=patterns[1],
        rslora=data.get("use_rslora") is True,
        fan_in_fan_out=data.get("fan_in_fan_out") is True,
        dora=data.get("use_dora") is True,
        base_name=name if isinstance(name, str) and name else None,
    )


def _refuse_variants(data: Mapping[str, Any], path: Path) -> None:
    start = data.get("init_lora_weights")
    if start not in _INITIALISATIONS:
        raise CheckpointError(
            f"{path}: init_lora_weights = {start!r} is not known to leave the base as it was; "
            "save the adapter with path_initial_model_for_weight_conversion, or fold it into its "
            "base with peft."
        )
    for key, value in data.items():
        if key in _UNDERSTOOD or key in _OF_TRAINING or not value:
            continue
        reason = _REASONS.get(key, "what it does to the weights is not known here")
        raise CheckpointError(
            f"{path}: {key} is not supported, since {reason}; fold the adapter into its base with "
            "peft (merge_and_unload) first."
        )


def _number(value: object, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise CheckpointError(
            f"{path}: {key} = {value!r} is no positive number; download or save the adapter again."
        )
    return float(value)


def _pattern(data: Mapping[str, Any], key: str, path: Path) -> dict[str, float]:
    found: object = data.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {key} is no mapping; download or save the adapter again.")
    pattern = cast("dict[str, object]", found)
    for module in pattern:
        try:
            re.compile(module)
        except re.error as error:
            raise CheckpointError(
                f"{path}: {key} has {module!r}, which is no pattern ({error}); mend it."
            ) from error
    return {m: _number(value, f"{key}[{m!r}]", path) for m, value in pattern.items()}


def _value_for(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """Return the value of the first pattern that matches a module's name or its end, as PEFT."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def new_config(
    *,
    base: str,
    ranks: Mapping[str, int],
    targets: Sequence[str],
    whole: Sequence[str],
    fan_in_fan_out: bool,
    biases: bool,
    task: str | None,
) -> dict[str, Any]:
    """Return the configuration of an adapter whose factors are to be multiplied as they are.

    ranks: by module, of all that have factors; targets: how PEFT finds these modules; whole: the
    modules kept as they are; biases: whether biases of modules with factors are kept too.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # the first match counts, and a short name may be the end of a longer one
    names = sorted((m for m in ranks if ranks[m] != rank), key=lambda m: (-len(m), m))
    others = {module: ranks[module] for module in names}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,  # alpha = rank: a scaling of 1
        "target_modules": sorted(targets),
        "modules_to_save": sorted(whole) or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
