"""Average rotations and lengths of slices of rows, and amplify what they change (CORAM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from mergewell import linalg
from mergewell.matrices import MatrixMerge, TaskMatrices
from mergewell.methods import ops
from mergewell.methods.base import Laws

_LOW, _HIGH = 3.5, 16.0  # dispersions of the task matrices' sizes with a published amplification


class Coram(MatrixMerge):
    """Average rotations and lengths of slices of rows, and amplify what they change (CORAM).

    `height` rows of the base are U_0 S_0 V_0', of expert k U_k S_k V_k'. Their rotations
    Q_k = U_0' U_k are averaged as logarithms, S_k / S_0 as they are, V_k by the polar factor of
    their mean; these give theta_m, and theta = theta_0 + kappa sqrt(K) (theta_m - theta_0).

    Paper: Sui et al. 2026, "CORAM" (no arXiv number seen).
    Departures: kappa follows from how much the experts' relative sizes differ in each matrix, not
    over the model: 1.15 up to a ratio of 3.5, 0.5 from 16 on (paper), in between on a line over the
    logarithm. A rotation that is a reflection has no real logarithm: then the polar factor of the
    mean is taken. Conflict masks and spread slices are not made. Coefficients weigh the means. What
    is no matrix is averaged.
    """

    paper: ClassVar[str] = "Sui et al. 2026, CORAM"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "height": (8, 64),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        equal_experts="What K experts change is amplified by sqrt(K), equal or not.",
        translation="Rotations are about the origin.",
        neutral={"amplification": 1.0, "scale": 1.0},
    )

    height: Annotated[int, Field(ge=1)] = 8
    """Rows of a slice; 8 or 16 in the paper."""

    amplification: float | None = None
    """kappa; from the experts' sizes unless given."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return what the averaged rotations and lengths change, amplified."""
        sizes = [linalg.frobenius(expert - matrices.base) for expert in matrices.experts]
        if max(sizes) == 0:
            return torch.zeros_like(matrices.base)
        height = min(self.height, *matrices.shape)
        whole = matrices.shape[0] // height * height
        cuts = [slice(0, whole), slice(whole, None)] if whole < matrices.shape[0] else [slice(None)]
        weights = (matrices.coefficients / matrices.coefficients.sum()).to(torch.float64)
        changes: list[Tensor] = []
        for cut in cuts:
            rows = [m[cut].to(torch.float64) for m in (matrices.base, *matrices.experts)]
            tall = height if cut.start in (0, None) else matrices.shape[0] - whole
            slices = [part.reshape(-1, tall, part.shape[1]) for part in rows]
            merged = _merged_slices(slices[0], slices[1:], weights)
            changes.append((merged - slices[0]).reshape(rows[0].shape))
        kappa = _kappa(sizes) if self.amplification is None else self.amplification
        return (kappa * len(sizes) ** 0.5 * torch.cat(changes)).to(matrices.base.dtype)

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that sum to zero: there is no mean."""
        return ops.zero_sum(coefficients)


def _kappa(sizes: Sequence[float]) -> float:
    moved = torch.tensor([size for size in sizes if size > 0], dtype=torch.float64)
    spread = (moved.max() / moved.min()).clamp(_LOW, _HIGH).log()
    low, high = torch.tensor([_LOW, _HIGH], dtype=torch.float64).log()
    return 1.15 - (1.15 - 0.5) * float((spread - low) / (high - low))


def _merged_slices(base: Tensor, experts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the merged slices; base and experts: [n, h, I], h <= I."""
    left, lengths, _ = _factors(base, None)
    found = [_factors(expert, left) for expert in experts]
    known = lengths > linalg.NOISE * lengths[:, :1]
    safe = torch.where(known, lengths, 1.0)
    ratios = [torch.where(known, own / safe, 1.0) for _, own, _ in found]
    turned = left @ _mean_rotation([left.mT @ own for own, _, _ in found], weights)
    right = _polar(ops.weighted_sum(weights, [own for _, _, own in found]))
    return (turned * (lengths * ops.weighted_sum(weights, ratios))[:, None]) @ right.mT


def _factors(slices: Tensor, like: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [n, h, h], S [n, h], V [n, I, h]; the signs of U as those of `like`."""
    squares, left = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(slices @ slices.mT))
    left, lengths = left.flip(-1), squares.flip(-1).clamp(min=0).sqrt()
    if like is not None:
        left = torch.where((like * left).sum(-2, keepdim=True) >= 0, left, -left)
    known = lengths > linalg.NOISE * lengths[:, :1]
    inverse = torch.where(known, 1 / torch.where(known, lengths, 1.0), 0.0)
    return left, lengths, (slices.mT @ left) * inverse[:, None]


def _polar(matrices: Tensor) -> Tensor:
    left, _, right = cast(
        "tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(matrices, full_matrices=False)
    )
    return left @ right


def _mean_rotation(turns: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return exp(sum w_k log Q_k) [n, h, h], or the polar factor of the mean beside reflections."""
    mean = _polar(ops.weighted_sum(weights, turns))
    proper = torch.stack([cast("Tensor", torch.linalg.det(t)) > 0 for t in turns]).all(0)
    logs = [w * linalg.log_rotations(turn) for w, turn in zip(weights, turns, strict=True)]
    exponential = cast("Tensor", torch.linalg.matrix_exp(ops.total(logs)))
    return torch.where(proper[:, None, None], exponential, mean)
