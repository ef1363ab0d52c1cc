"""Fine-tuning experts that shall merge: penalties and SAM, for any training loop in torch."""

from mergewell.finetune.l2_sp import L2SP
from mergewell.finetune.sam import Sam
from mergewell.finetune.weight_scope import Scope, WeightScope, fused, scopes_of

__all__ = ["L2SP", "Sam", "Scope", "WeightScope", "fused", "scopes_of"]
