"""TIES in a basis of directions that all experts share (decomposed, renormalised merging)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from mergewell import linalg
from mergewell.matrices import MatrixMerge, TaskMatrices, mean_of_agreeing, trimmed
from mergewell.methods import ops
from mergewell.methods.base import Fraction, Laws, Probability


class Drm(MatrixMerge):
    """TIES in a basis of directions that all experts share (decomposed, renormalised merging).

    U holds the left singular vectors of [M_1 | .. | M_K], M_k = c_k (theta_k - theta_0). The
    coordinates U' M_k are cut to their largest entries, a sign is elected for each, what agrees is
    averaged, and Delta = U times that. Along the inputs the right singular vectors of the matrices
    below one another are used.

    Paper: Chaichana et al. 2025, "Decom-Renorm-Merge", arXiv:2505.23117, section 3.
    Departures: U comes from sum_k M_k M_k', so the wide matrix is never made, and the coordinates
    are U' M_k: normalising the rows of V_k and moving their lengths into S_k, as in the paper,
    leaves S_k V_k' as it is. The density is that of TIES; the paper's was not read.
    """

    paper: ClassVar[str] = "arXiv:2505.23117"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.05, 0.2, 0.5),
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4),
    }
    laws: ClassVar[Laws] = Laws(neutral={"density": 1.0, "cutoff": 0.0, "scale": 1.0})

    along: Literal["outputs", "inputs"] = "outputs"
    """Share directions of the outputs (horizontal), or of the inputs (vertical)."""

    density: Fraction = 0.2
    """Share of each expert's coordinates that is kept, the largest."""

    cutoff: Probability = 0.01
    """Directions shorter than this share of the longest are dropped."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return what agrees among the experts' coordinates, in the common basis."""
        turned = self.along == "inputs"
        seen = [matrix.T if turned else matrix for matrix in matrices]
        squares, vectors = linalg.eigh(ops.total([linalg.gram(matrix.T) for matrix in seen]))
        lengths = squares.clamp(min=0).sqrt()
        count = int((lengths > max(self.cutoff, linalg.NOISE) * lengths[0]).sum())
        basis = vectors[:, :count].to(matrices.base.dtype)
        coordinates = [basis.T @ matrix for matrix in seen]
        merged = mean_of_agreeing([trimmed(c, self.density) for c in coordinates])
        return (basis @ merged).T if turned else basis @ merged
