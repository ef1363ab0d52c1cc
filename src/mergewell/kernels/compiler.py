"""How loops are compiled: without Python's lock, kept on disk, and as wide as the machine is."""
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

from numba import config, njit  # pyright: ignore[reportPrivateImportUsage]
from numba.core.codegen import get_host_cpu_features


def _widen() -> None:
    """Use vectors of 512 bits where there are any; see decision 0024.

    LLVM keeps to 256 where the first processors that had wider ones lowered their clock for them.
    Who set NUMBA_CPU_FEATURES, or compiled with numba before, keeps what is set there.
    """
    features = get_host_cpu_features()
    if config.CPU_FEATURES is None and "+avx512vl" in features:
        config.CPU_FEATURES = f"{features},-prefer-256-bit"


_widen()
fused = njit(nogil=True, cache=True)
inlined = njit(nogil=True, cache=True, inline="always")
