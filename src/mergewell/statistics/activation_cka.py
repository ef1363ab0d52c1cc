"""Centred kernel alignment (CKA) between what several models make of the same samples.

Shapes: P models, N samples, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergewell.errors import DataError

FEWEST = 4
"""Samples that there must be: the unbiased estimate divides by N - 3."""


def linear_cka(models: Tensor) -> Tensor:
    """Return the unbiased linear CKA of features [P, N, D] of P models, [P, P]; nan if undefined.

    An unbiased estimate may lie a little outside of [0, 1] before it is clipped to [-1, 1]. With
    centred features the unbiased HSIC is sum (X'Y)^2 and terms in the samples' squared norms
    alone; the sum is made over N x N or D x D products, whichever are smaller.

    Source: Song et al. 2012, equation 5 (HSIC_1); Nguyen, Raghu and Kornblith 2021,
    arXiv:2010.15327, section 3. Departures: over all samples at once, not batch by batch.

    Raises:
        DataError: there are too few samples.
    """
    if models.shape[1] < FEWEST:
        raise DataError(
            f"CKA needs at least {FEWEST} samples, but there are {models.shape[1]}; give more data."
        )
    wide = models.to(torch.float64)
    centred = wide - wide.mean(1, keepdim=True)
    size = centred.abs().amax((1, 2), keepdim=True)
    # what rounding leaves of features that are all the same does not count as variation
    varied = size > 1e-12 * wide.abs().amax((1, 2), keepdim=True)
    centred = torch.where(varied, centred / torch.where(size == 0, 1.0, size), 0.0)
    samples, width = centred.shape[1:]
    if samples <= width:
        grams = (centred @ centred.mT).flatten(1)
        squares = grams @ grams.T
    else:
        squares = torch.stack(
            [torch.stack([(x.T @ y).square().sum() for y in centred]) for x in centred]
        )
    norms = centred.square().sum(2)
    totals = norms.sum(1)
    own = norms @ norms.T * (1 + 2 / (samples - 2))
    hsic = squares - own + totals[:, None] * totals / (samples - 1) / (samples - 2)
    real = hsic.diagonal() > 1e-9 * totals.square()
    lengths = torch.where(real, hsic.diagonal(), torch.nan).sqrt()
    return (hsic / lengths[:, None] / lengths).clamp(-1, 1)
