"""GGUF files, read as transformers would name and lay their tensors; quantised ones are refused.

A file is a header of typed keys and values, a list of tensors, and their elements at multiples of
an alignment. llama.cpp renames tensors and turns the rows of queries and keys of Llama models
(halves of a head become pairs): both are undone here.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and
llama.cpp, `convert_hf_to_gguf.py`, for the names and the order of rows.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.storage.spec import TensorSpec
from mergewell.storage.weight_file import WeightFile

GGUF = ".gguf"
_REMEDY = "download or convert the file again"

_TYPES: Mapping[int, torch.dtype] = {
    0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64,
    24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
}  # fmt: skip
_QUANTISED: Mapping[int, str] = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_TURNED = ("llama",)
"""Architectures (Mistral's is llama's) whose queries and keys llama.cpp turns."""
_KNOWN = (*_TURNED, "qwen2", "qwen3")
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_COMPUTED = ("rope_freqs.weight",)
"""Tensors that models compute for themselves."""


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    heads: int
    """Heads whose rows are turned; 0 where rows are as they are in transformers."""


class GgufFile(WeightFile):
    """A GGUF file of unquantised tensors, mapped."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: damaged, quantised, or of an architecture whose names are not known.
        """
        super().__init__(path)
        reader = _Header(path, self._map())
        try:
            values, tensors, start = reader.read()
        except (struct.error, IndexError, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} is a damaged GGUF file ({error}); {_REMEDY}.") from error
        kind = str(values.get("general.architecture"))
        if kind not in _KNOWN:
            raise CheckpointError(
                f"{path} is of the architecture {kind!r}, whose names are not known here, only "
                f"{', '.join(_KNOWN)}; give the model as safetensors."
            )
        heads = int(values.get(f"{kind}.attention.head_count", 0))
        shared = values.get(f"{kind}.attention.head_count_kv", heads)
        turned = {"attn_q": heads, "attn_k": int(shared)} if kind in _TURNED else {}
        self._size = len(self._map())
        self._places: dict[str, _Place] = {}
        specs: dict[str, TensorSpec] = {}
        for own, shape, number, offset in tensors:
            if own in _COMPUTED:
                continue
            name = self._name(own)
            spec = TensorSpec(name, self._dtype(number, own), shape)
            if start + offset + spec.nbytes > self._size:
                raise CheckpointError(
                    f"{path} is truncated: {own} ends behind its {self._size} bytes; {_REMEDY}."
                )
            block = _BLOCK.fullmatch(own)
            specs[name] = spec
            self._places[name] = _Place(start + offset, turned.get(block[2], 0) if block else 0)
        self.specs, self.aliases = specs, {}
        self.metadata = {key: v for key, v in values.items() if isinstance(v, str)}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a tensor, flat; no copy but of turned or odd rows."""
        spec, place = self.specs[name], self._places[name]
        if start == stop:
            return torch.empty(0, dtype=spec.dtype)
        if not place.heads:
            return self._stored(spec, place.offset, start, stop)
        rows = spec.shape[0]
        width = spec.numel // rows
        first, last = start // width, -(-stop // width)
        # row s * half + d of a head is the head's row 2 d + s in the file
        order = torch.arange(rows).view(place.heads, -1, 2).transpose(1, 2).reshape(-1)[first:last]
        whole = self._stored(spec, place.offset, 0, spec.numel).view(rows, width)
        return whole[order].reshape(-1)[start - first * width : stop - first * width]

    def _stored(self, spec: TensorSpec, offset: int, start: int, stop: int) -> Tensor:
        at = offset + start * spec.dtype.itemsize
        if at % spec.dtype.itemsize == 0:
            return torch.frombuffer(self._map(), dtype=spec.dtype, count=stop - start, offset=at)
        count = (stop - start) * spec.dtype.itemsize
        raw = torch.frombuffer(self._map(), dtype=torch.uint8, count=count, offset=at)
        return raw.clone().view(spec.dtype)

    def _map(self) -> mmap.mmap:
        with self._opening:
            if self._opened is None:
                try:
                    with self.path.open("rb") as file:
                        self._opened = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:
                    raise CheckpointError(
                        f"{self.path} cannot be read ({error}); check it."
                    ) from error
            return self._opened

    def _name(self, own: str) -> str:
        block = _BLOCK.fullmatch(own)
        if block is not None and block[2] in _INSIDE:
            return f"model.layers.{block[1]}.{_INSIDE[block[2]]}.{block[3]}"
        before, _, kind = own.rpartition(".")
        if before in _OUTSIDE:
            return f"{_OUTSIDE[before]}.{kind}"
        raise CheckpointError(
            f"{self.path}: what {own!r} is called in transformers is not known here; give the "
            "model as safetensors."
        )

    def _dtype(self, number: int, own: str) -> torch.dtype:
        if number in _TYPES:
            return _TYPES[number]
        raise CheckpointError(
            f"{self.path}: {own} is quantised ({_QUANTISED.get(number, f'type {number}')}), and a "
            "merge of such numbers would merge their rounding; give the F16, BF16 or F32 file."
        )


class _Header:
    """Reads a header from the front."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0

    def read(self) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
        """Return values by key, tensors as (name, shape, type, offset), and where they begin."""
        if self._content[:4] != b"GGUF":
            raise CheckpointError(f"{self._path} is no GGUF file; {_REMEDY}.")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path} is GGUF of version {version}; {_REMEDY}.")
        count, keys = self._number("<Q"), self._number("<Q")
        values = {self._text(): self._value(self._number("<I")) for _ in range(keys)}
        tensors = [self._tensor() for _ in range(count)]
        step = int(values.get("general.alignment", 32))
        return values, tensors, -(-self._at // step) * step

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("<I")
        # the fastest dimension stands first
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown type {kind}")
        return self._number(_SCALARS[kind])

    def _text(self) -> str:
        size = self._number("<Q")
        if self._at + size > len(self._content):
            raise ValueError(f"a text of {size} bytes")
        text = self._content[self._at : self._at + size].decode("utf-8")
        self._at += size
        return text

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return value
