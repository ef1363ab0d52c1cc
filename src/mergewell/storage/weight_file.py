"""Files of weights: safetensors through a memory map, and PyTorch's own without running code."""

from __future__ import annotations

import mmap
import pickle
import sys
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.storage.header import Header, read_header
from mergewell.storage.spec import TensorSpec, dtype_name

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# A private writable map would be charged against memory as if every page were to change; files
# larger than memory would be refused. The constant got its name in Python 3.13 only.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_OF_THE_PROCESS = ("passing", "_opening", "_opened")


class Passing(Protocol):
    """Somebody who wants to know how far a file is read, such as a `PassingHash`."""

    def reached(self, content: memoryview, end: int) -> None:
        """Take note that readers are through with `content`, the file's bytes, up to `end`."""


class WeightFile(ABC):
    """One file of weights, opened again on the first read after pickling."""

    path: Path
    specs: Mapping[str, TensorSpec]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passing: Passing | None = None
        self._opening = Lock()
        self._opened: Any = None

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a tensor, flat."""

    def close(self) -> None:
        """Let go of the file; tensors that were read keep what they need of it."""
        # torch.frombuffer holds a reference but no export, so closing the map here would leave
        # those tensors without memory: only the reference is dropped.
        self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in _OF_THE_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, passing=None, _opening=Lock(), _opened=None)


class SafetensorsFile(WeightFile):
    """A safetensors file, read through a private memory map.

    Who cuts the file short while it is read ends this process (SIGBUS), as with any map.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: the file cannot be read or is malformed.
        """
        super().__init__(path)
        self._header: Header = read_header(path)
        self.specs = self._header.specs
        self.metadata = self._header.metadata
        # safetensors.torch.save_model notes a tensor that it left out as {its name: kept name}.
        self.aliases = {
            name: kept
            for name, kept in self.metadata.items()
            if kept in self.specs and name not in self.specs
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a tensor, flat; no copy unless misaligned.

        Raises:
            CheckpointError: the file changed its size since it was opened.
        """
        dtype = self.specs[name].dtype
        if start == stop:
            return torch.empty(0, dtype=dtype)
        offset = self._header.offsets[name] + start * dtype.itemsize
        if self.passing is not None:  # what comes before this block has been read, and is in reach
            self.passing.reached(memoryview(self._map()), offset)
        if offset % dtype.itemsize == 0:
            return torch.frombuffer(self._map(), dtype=dtype, count=stop - start, offset=offset)
        # Kernels may assume that an element lies at a multiple of its size.
        count = (stop - start) * dtype.itemsize
        raw = torch.frombuffer(self._map(), dtype=torch.uint8, count=count, offset=offset)
        return raw.clone().view(dtype)

    def _map(self) -> mmap.mmap:
        with self._opening:
            if self._opened is None:
                self._opened = self._open_map()
            return self._opened

    def _open_map(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                # Private and writable: torch warns of buffers that cannot be written, and a
                # method that changes its input by mistake must not change the file.
                mapped = mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); check it.") from error
        if len(mapped) != self._header.size:
            raise CheckpointError(
                f"{self.path} changed from {self._header.size} to {len(mapped)} bytes since it "
                "was opened; run again when nobody writes to it."
            )
        return mapped


class PickleFile(WeightFile):
    """A PyTorch file, loaded without running code; mapped where its format allows it."""

    metadata: Mapping[str, str]

    def __init__(self, path: Path) -> None:
        """Load the file; files in the format from before PyTorch 1.6 come whole into memory.

        Raises:
            CheckpointError: not loadable without running code, or not a mapping to tensors.
        """
        super().__init__(path)
        tensors = self._tensors()
        specs: dict[str, TensorSpec] = {}
        aliases: dict[str, str] = {}
        kept: dict[object, str] = {}
        for name, tensor in tensors.items():
            where = f"{path}: tensor {name!r}"
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                raise CheckpointError(f"{where} is not dense; save it as an ordinary tensor.")
            dtype_name(tensor.dtype, where=where)
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and kept.setdefault(place, name) != name:
                aliases[name] = kept[place]
            else:
                specs[name] = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        self.specs, self.aliases, self.metadata = specs, aliases, {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a tensor, flat; no copy if it lies contiguous.

        Raises:
            CheckpointError: the file cannot be loaded again.
        """
        tensor = self._tensors()[name].detach()
        if tensor.is_contiguous() or tensor.numel() == 0:
            return tensor.reshape(-1)[start:stop]
        row = tensor[0].numel()  # only the rows in question are brought into order
        first, last = start // row, -(-stop // row)
        return tensor[first:last].reshape(-1)[start - first * row : stop - first * row]

    def _tensors(self) -> dict[str, Tensor]:
        with self._opening:
            if self._opened is None:
                self._opened = self._load()
            return self._opened

    def _load(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():  # of old storages, about which nobody can do a thing
                warnings.simplefilter("ignore")
                found: object = torch.load(
                    self.path,
                    map_location="cpu",
                    weights_only=True,
                    mmap=zipfile.is_zipfile(self.path),
                )
        except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path} cannot be loaded ({_first_line(error)}); "
                "download or save the file again."
            ) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.path} holds more than tensors, which is not loaded since it could run "
                "code; save its state_dict() as safetensors."
            ) from error
        return self._state_dict(found)

    def _state_dict(self, found: object) -> dict[str, Tensor]:
        remedy = "save its state_dict() as safetensors"
        if not isinstance(found, Mapping):
            raise CheckpointError(
                f"{self.path} holds a {type(found).__name__} and no mapping of tensors; {remedy}."
            )
        outer = cast("Mapping[object, object]", found)
        inner = outer.get("state_dict", outer)
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"{self.path}: 'state_dict' is no mapping; {remedy}.")
        tensors: dict[str, Tensor] = {}
        for name, value in cast("Mapping[object, object]", inner).items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self.path}: {name!r} is a {type(value).__name__} and no tensor; {remedy}."
                )
            tensors[name] = value
        return tensors


def open_weight_file(path: Path) -> WeightFile:
    """Return the file of weights `path`, its kind taken from the suffix.

    Raises:
        CheckpointError: the suffix is unknown, or the file cannot be read.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return PickleFile(path)
    if path.suffix == ".gguf":
        from mergewell.storage.gguf import GgufFile  # a kind of these files, as the others are

        return GgufFile(path)
    raise CheckpointError(
        f"{path} is of no known kind; give a .safetensors, .gguf, {', '.join(PICKLE_SUFFIXES)} or "
        ".index.json file, or a folder."
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
