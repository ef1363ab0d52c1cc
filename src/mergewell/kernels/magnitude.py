"""The fused form of `MagnitudeThreshold`."""

from __future__ import annotations

from mergewell.kernels.base import Program
from mergewell.kernels.thresholds import OrderProgram
from mergewell.statistics.magnitude import MagnitudeThreshold


def program(statistic: MagnitudeThreshold) -> Program | None:
    """Return the fused form; thresholds that come with norms have none."""
    return OrderProgram(statistic) if type(statistic) is MagnitudeThreshold else None
