"""TensorSpec: a tensor's name, dtype and shape, and the one table of dtype names."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch

from mergewell.errors import CheckpointError

DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""The safetensors names of the dtypes that can be read and written."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of one tensor: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take in a file."""
        return self.numel * self.dtype.itemsize


def dtype_from_name(name: object, *, where: str) -> torch.dtype:
    """Return the dtype that safetensors calls `name`; `where` begins the error's sentence.

    Raises:
        CheckpointError: the dtype is not one that we read.
    """
    if isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    raise CheckpointError(
        f"{where}: dtype {name!r} is not supported; convert it to one of {', '.join(DTYPES)}."
    )


def dtype_name(dtype: torch.dtype, *, where: str) -> str:
    """Return what safetensors calls `dtype`; `where` begins the error's sentence.

    Raises:
        CheckpointError: the dtype is not one that we write.
    """
    if dtype in _NAMES:
        return _NAMES[dtype]
    raise CheckpointError(
        f"{where}: dtype {dtype} is not supported; convert it to one of {', '.join(DTYPES)}."
    )


def is_mergeable(dtype: torch.dtype) -> bool:
    """Return True for floating dtypes: the others can only be copied."""
    return dtype.is_floating_point
