"""Correct the merged model behind every block, for each task; the task has to be known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from mergewell.errors import ModelError
from mergewell.surgery.correction import block_names
from mergewell.surgery.learner import SurgeryLearner


class SurgeryV2(SurgeryLearner):
    """Correct the merged model behind every block, for each task; the task has to be known.

    As `surgery`, with a correction behind each of the network's repeated blocks and one behind the
    features, trained together: each is to be near to what expert t gives at that place, on its own
    path. The network is run at every step, so that it costs far more than `surgery`.

    Paper: Yang et al. 2024, "SurgeryV2", arXiv:2410.14389, section 4. Departures: inputs and
    batches as in `surgery`; padding does not count; images are corrected alike at every place.
    """

    paper: ClassVar[str] = "arXiv:2410.14389"

    def places(self, module: nn.Module) -> Sequence[str]:
        """Return the blocks, and where the features come from.

        Raises:
            ModelError: the network has no repeated blocks.
        """
        blocks = block_names(module)
        if not blocks:
            raise ModelError(
                f"{type(module).__name__} has no repeated blocks to correct; use surgery."
            )
        return [*(name for name in blocks if name != self.at), self.at]
