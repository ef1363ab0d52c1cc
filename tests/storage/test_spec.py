import pytest
import torch

from mergewell.errors import CheckpointError
from mergewell.storage.spec import DTYPES, TensorSpec, dtype_from_name, dtype_name, is_mergeable


def test_sizes_are_those_of_the_elements():
    spec = TensorSpec("w", torch.bfloat16, (3, 5))
    assert (spec.numel, spec.nbytes) == (15, 30)
    assert TensorSpec("scalar", torch.float64, ()).nbytes == 8
    assert TensorSpec("empty", torch.float64, (4, 0)).nbytes == 0


def test_every_dtype_has_one_name():
    assert len(set(DTYPES.values())) == len(DTYPES) == 17
    for name, dtype in DTYPES.items():
        assert dtype_from_name(name, where="") is dtype
        assert dtype_name(dtype, where="") == name


def test_unknown_dtypes_are_named():
    with pytest.raises(CheckpointError, match=r"a.safetensors: tensor 'w': dtype 'F4' is not supp"):
        dtype_from_name("F4", where="a.safetensors: tensor 'w'")
    with pytest.raises(CheckpointError, match=r"tensor 'w': dtype torch.complex64 is not supp"):
        dtype_name(torch.complex64, where="tensor 'w'")


def test_only_floating_tensors_are_mergeable():
    floating = {name for name, dtype in DTYPES.items() if is_mergeable(dtype)}
    assert floating == {name for name in DTYPES if name.startswith(("F", "BF"))}
