"""Correct the merged model's features for each task, in a companion; the task has to be known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from mergewell.surgery.learner import SurgeryLearner


class Surgery(SurgeryLearner):
    """Correct the merged model's features for each task, in a companion; the task has to be known.

    Behind the features z of the merged model goes z - U_t relu(D_t z), trained on unlabelled inputs
    of task t until it is near to what expert t gives there (mean L1 distance). The merge itself
    stays as it is. `mergewell.surgery.companion.load_corrected` makes the module of one task. A few
    inputs are learned by heart, however near the note says the features are: judge it on others.

    Paper: Yang et al. 2024, "Representation Surgery for Multi-Task Model Merging",
    arXiv:2402.02705, section 4. Departures: the paper trains on the inputs that it is tested on;
    here the inputs are whatever is given. A task's batches come in turn, one a step and not two.
    """

    paper: ClassVar[str] = "arXiv:2402.02705"

    def places(self, module: nn.Module) -> Sequence[str]:
        """Return the one place: where the features come from."""
        del module
        return [self.at]
