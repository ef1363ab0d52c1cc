"""Elect a sign for each entry and take the largest change that has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup


class Emr(MergeMethod):
    """Elect a sign for each entry and take the largest change that has it.

    s = sign(sum_k c_k tau_k); theta = theta_0 + scale s max_k {|c_k tau_k| : sign(c_k tau_k) = s}.

    The unified task vector: every expert's changes of the elected sign are covered by it.

    Paper: Huang et al. 2024, "EMR-Merging", arXiv:2405.17461, section 3.2 (elect).
    Departures: the unified task vector alone, as one model. The paper masks and rescales it for
    each task when it is used; such companions are not made here, and without them the vector is
    too large for several tasks: lower `scale`. A draw elects plus (the authors' code: minus).
    Coefficients multiply the task vectors.
    """

    paper: ClassVar[str] = "arXiv:2405.17461"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6)
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(neutral={"scale": 1.0})

    scale: float = 1.0
    """Factor on the unified task vector."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled unified task vector."""
        taus = [c * tau for c, tau in zip(group.coefficients, group.task_vectors, strict=True)]
        elected = ops.elect_sign(taus, "mass")
        size = torch.zeros_like(elected)
        for tau in taus:
            size = torch.maximum(size, torch.where(tau.sign() == elected, tau.abs(), 0.0))
        return group.required_base + self.scale * (elected * size)
