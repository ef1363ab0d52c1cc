"""Activations: what one block of every model gave for one batch, laid out for statistics.

Shapes: P models (the base, the K experts, the merged model), N samples, T positions (tokens,
pixels), D features (nodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.errors import DataError


@dataclass(frozen=True, slots=True)
class BlockOutputs:
    """What one block of every model gave for one batch."""

    rows: Sequence[Tensor]
    """P tensors [R, D], the observations that count: all positions of all samples, not padding."""

    pooled: Tensor
    """Mean over each sample's positions that count, [P, N, D], float32."""

    start: int = 0
    """Number of the first sample among all samples of the data."""

    @classmethod
    def of(
        cls, outputs: Sequence[Tensor], *, node_dim: int, keep: Tensor | None = None, start: int = 0
    ) -> BlockOutputs:
        """Lay out P tensors of one shape [N, ...] with the nodes along `node_dim`.

        `keep` is boolean, [N, T] for tensors [N, T, D], and false on padding.

        Raises:
            DataError: the tensors differ in shape, have no samples first, or do not fit `keep`.
        """
        shapes = {tuple(output.shape) for output in outputs}
        shape = outputs[0].shape
        if len(shapes) > 1 or len(shape) < 2 or node_dim % len(shape) == 0:
            raise DataError(
                f"A block gave outputs of shapes {sorted(shapes)}; all models must give one shape "
                "that begins with the samples."
            )
        if keep is not None and (
            node_dim % len(shape) != len(shape) - 1 or keep.shape != shape[:-1]
        ):
            raise DataError(
                f"A mask of shape {tuple(keep.shape)} does not fit a block's output of shape "
                f"{tuple(shape)}; it must be that shape without the nodes."
            )
        if keep is not None and bool(keep.all()):
            keep = None
        index, shares = (None, None) if keep is None else _kept(keep.flatten(1))
        rows: list[Tensor] = []
        pooled: list[Tensor] = []
        for output in outputs:
            laid = (
                output.movedim(node_dim, -1).flatten(1, -2) if len(shape) > 2 else output[:, None]
            )
            laid = laid.float()  # [N, T, D]
            if index is None or shares is None:
                rows.append(laid.flatten(0, 1))
                pooled.append(laid.mean(1))
            else:
                rows.append(laid.flatten(0, 1).index_select(0, index))
                pooled.append(shares @ rows[-1])
        return cls(rows, torch.stack(pooled), start)


def _kept(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of N * T rows count, [R], and their shares in their samples' means, [N, R]."""
    counts = keep.sum(1)
    sample_of, _ = keep.nonzero(as_tuple=True)
    shares = torch.zeros(len(keep), len(sample_of))
    places = torch.arange(len(sample_of))
    shares[sample_of, places] = 1 / counts[sample_of].float()
    return keep.flatten().nonzero()[:, 0], shares
