"""Forms: how mixtures of models of each architecture are called, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergewell.mixture.choice import Mixture

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense model's feed-forward layer."""

RESIDUAL = "down_proj"
"""The one that writes to the residual stream."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a mixture of models of one architecture is called."""

    architecture: str
    model_type: str
    block: str
    """The name of a layer's mixture."""

    names: Mapping[str, str]
    """What an expert calls the matrices of a feed-forward layer."""

    shared: int = 0
    """Experts for all tokens that a layer has."""

    def config(self, dense: Mapping[str, Any], mixture: Mixture) -> dict[str, Any]:
        """Return the mixture's config.json for the base's."""
        count, size = len(mixture.experts), dense.get("intermediate_size")
        return {
            **{key: value for key, value in dense.items() if key != "sliding_window"},
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "num_local_experts": count,
            "num_experts": count,
            "num_experts_per_tok": mixture.experts_per_token,
            "moe_intermediate_size": size,
            **({"shared_expert_intermediate_size": size} if self.shared else {}),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            **({"sliding_window": None} if "sliding_window" in dense else {}),
            **({} if mixture.dtype is None else {"dtype": mixture.dtype}),
        }

    def home(self, expert: int, mixture: Mixture) -> str:
        """Return the name, after the layer's, of a routed expert, or of a shared one behind."""
        routed = len(mixture.experts)
        return (
            f"{self.block}.experts.{expert}" if expert < routed else f"{self.block}.shared_expert"
        )


_MIXTRAL = Form(
    "MixtralForCausalLM", "mixtral", "block_sparse_moe",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)  # fmt: skip
_SAME = {name: name for name in PROJECTIONS}
FORMS: Mapping[str, Form] = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen2": Form("Qwen2MoeForCausalLM", "qwen2_moe", "mlp", _SAME, shared=1),
    "qwen3": Form("Qwen3MoeForCausalLM", "qwen3_moe", "mlp", _SAME),
}
"""By the architecture of the dense models."""
