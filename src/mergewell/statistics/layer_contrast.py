"""How rich each task matrix is against its base, and how much it conflicts with it, by layer."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from mergewell import linalg
from mergewell.statistics.base import State, WeightStatistic
from mergewell.statistics.depth import LAYER_PATTERN, layer_number
from mergewell.statistics.ops import rows_of
from mergewell.tensor_group import TensorGroup, Value

_KEY = ":contrast"


class LayerContrast(WeightStatistic):
    """Effective-rank contrast and conflict of every expert in every matrix, and their depths.

    contrast = r(theta_0) / r(tau), r the exponential of the entropy of the squared singular values'
    shares; conflict = (||W T' - T W'|| + ||W' T - T' W||) / (2 ||W|| ||T||) for the base's matrix W
    and the task matrix T, both 0 where the expert did not move. Needs whole tensors.

    Source: LARV, arXiv:2602.09413, equation 8, as another's implementation has it.
    """

    scope: Literal["tensor", "model"] = "model"
    """Values are set against those of all layers."""

    pattern: str = LAYER_PATTERN
    """Regular expression whose first group is a layer's number."""

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return contrast and conflict [2, K] of a matrix; nothing of vectors."""
        del done, index
        if group.experts[0].dim() < 2 or not group.experts[0].numel():
            return {}
        base = rows_of(group.required_base)
        base = base if base.shape[0] <= base.shape[1] else base.T
        own, length = _effective_rank(base), linalg.frobenius(base)
        found: list[tuple[float, float]] = []
        for tau in group.task_vectors:
            matrix = rows_of(tau) if base.shape == rows_of(tau).shape else rows_of(tau).T
            size = linalg.frobenius(matrix)
            if size == 0 or length == 0:
                found.append((0.0, 0.0))
                continue
            outer, inner = base @ matrix.T, base.T @ matrix
            apart = linalg.frobenius(outer - outer.T) + linalg.frobenius(inner - inner.T)
            found.append((own / _effective_rank(matrix), apart / (2 * length * size)))
        return {f"{group.name}{_KEY}": torch.tensor(found, dtype=torch.float64).T}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `contrast`, `conflict` [L, K] of all L matrices, `depth` [L], and our `row`.

        The depth is (number + 1) / layers, 1 outside of numbered layers. `row` is -1 of a vector,
        and stands alone where there is no matrix.
        """
        del numel
        names = sorted(key.removesuffix(_KEY) for key in done if key.endswith(_KEY))
        if not names:
            return {"row": torch.tensor(-1)}
        numbers = [layer_number(self.pattern, key) for key in names]
        layers = 1 + max((n for n in numbers if n is not None), default=0)
        both = torch.stack([done[key + _KEY] for key in names])
        depth = [1.0 if n is None else (n + 1) / layers for n in numbers]
        return {
            "contrast": both[:, 0],
            "conflict": both[:, 1],
            "depth": torch.tensor(depth, dtype=torch.float64),
            "row": torch.tensor(names.index(name) if name in names else -1),
        }


def _effective_rank(matrix: Tensor) -> float:
    """Return exp(entropy) of the shares of the squared singular values of a matrix [O <= I]."""
    squares = linalg.eigh(linalg.gram(matrix.T))[0].clamp(min=0)
    shares = squares / squares.sum()
    return float(cast("Tensor", torch.special.entr(shares)).sum().exp())
