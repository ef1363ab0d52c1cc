"""Learn coefficients that make the merged model certain of its answers."""

from __future__ import annotations

from typing import ClassVar

from mergewell.descent.learner import CoefficientLearner
from mergewell.descent.steps import Descent
from mergewell.descent.tasks import Aim


class AdaMerging(CoefficientLearner):
    """Learn coefficients that make the merged model certain of its answers.

    Minimises the mean entropy of the merged model's answers to unlabelled inputs of every task, by
    Adam from 0.3; `per: tensor` is the paper's layer-wise form, `task` its task-wise one. For
    AdaMerging++ let `method` be {name: ties, divide: none, elect: count, scale: 1}.

    Paper: Yang et al. 2024, "AdaMerging", arXiv:2310.02575, section 3.2.
    Departures: the paper learns on the inputs that it is tested on; here the inputs are whatever is
    given. Every task counts the same. Entropy can be low for wrong answers: judge the result.
    """

    paper: ClassVar[str] = "arXiv:2310.02575"
    data: ClassVar[str] = "unlabelled"
    aim: ClassVar[Aim] = "entropy"

    def descent(self) -> Descent:
        """Return plain Adam."""
        return Descent(self.steps, self.rate)
