"""Drop the lowest spatial frequencies of each task matrix, and weigh by size (FR-Merging)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mergewell.matrices import MatrixMerge, TaskMatrices
from mergewell.methods import ops
from mergewell.methods.base import Laws, Probability


class Free(MatrixMerge):
    """Drop the lowest spatial frequencies of each task matrix, and weigh by size (FR-Merging).

    A two-dimensional Fourier transform, without the frequencies below `cutoff`, gives F_k of
    c_k (theta_k - theta_0) = M_k; Delta = sum_k lambda_k F_k, lambda_k = mean |M_k| / sum_j mean
    |M_j|.

    Paper: Zheng and Wang 2025, "FREE-Merging", arXiv:2411.16815, section 3.2 (the FR part).
    Departures: the paper writes the mean of M_k itself, which is near 0 and may be negative. The
    code drops what is within 1 % of the zero frequency for a square matrix, which is our default;
    for others it drops by array positions, we by frequency. The experts and the router of FREE are
    no single model and not made here. What is no matrix is averaged; the code leaves it as the
    base has it. The lambda_k sum to one: raise `scale` for many experts.
    """

    paper: ClassVar[str] = "arXiv:2411.16815"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "cutoff": (0.01, 0.05),
        "scale": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    }
    laws: ClassVar[Laws] = Laws(neutral={"cutoff": 0.0, "scale": 1.0, "align": False})

    scale: float = 0.7
    """Factor on the merged task vector, of matrices and all else."""

    cutoff: Probability = 0.01
    """Frequencies dropped: those nearer to 0 than this share of the highest; 0 drops none."""

    align: bool = False
    """First scale every task matrix to the largest mean magnitude among them."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the filtered task matrices weighed by their mean magnitudes."""
        sizes = torch.stack([matrix.abs().mean() for matrix in matrices])
        whole = float(sizes.sum())
        if whole == 0:
            return torch.zeros_like(matrices.base)
        weights = sizes / whole
        if self.align:
            moved = sizes > 0
            lift = sizes.max() / torch.where(moved, sizes, 1.0)
            weights = torch.where(moved, lift / moved.sum(), 0.0)
        return ops.total([w * self._filtered(m) for w, m in zip(weights, matrices, strict=True)])

    def _filtered(self, matrix: Tensor) -> Tensor:
        """Return a matrix without its low frequencies."""
        if self.cutoff == 0:
            return matrix
        rows, columns = matrix.shape
        down = cast("Tensor", torch.fft.fftfreq(rows)).to(matrix)
        across = cast("Tensor", torch.fft.rfftfreq(columns)).to(matrix)
        frequency = (down.square()[:, None] + across.square()).sqrt() / 0.5**0.5
        spectrum = cast("Tensor", torch.fft.rfft2(matrix))
        kept = torch.where(frequency < self.cutoff, 0.0, spectrum)
        return cast("Tensor", torch.fft.irfft2(kept, s=(rows, columns)))
