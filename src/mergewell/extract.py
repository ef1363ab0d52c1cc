"""Extract: a LoRA adapter of what an expert, or a merged model, adds to its base.

Every matrix that changed is written as two factors, by a truncated singular value decomposition of
its change; what is no matrix is kept whole. How far the product is from the change is measured on
the factors as they are stored, tensor by tensor. A merge that was stored in 16 bits holds its own
rounding as well, which no low rank can: merge with dtype float32 what is to be extracted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergewell.errors import CheckpointError, PlanError, RecipeError
from mergewell.extract_layout import Layout, Treatment, make_layout
from mergewell.linalg import Factors, frobenius, sketched_svd
from mergewell.low_rank import decomposed
from mergewell.storage.adapter import ADAPTER_WEIGHTS
from mergewell.storage.adapter_config import ADAPTER_CONFIG, new_config
from mergewell.storage.adapter_keys import PREFIX
from mergewell.storage.checkpoint import Checkpoint, open_checkpoint
from mergewell.storage.manifest import InputFile, Manifest, hash_file, versions
from mergewell.storage.spec import TensorSpec
from mergewell.storage.writer import CheckpointWriter, ShardLayout, require_free_name
from mergewell.tensor_group import random_key

FactorDtype = Literal["float32", "float16", "bfloat16"]
OnStep = Callable[[str, float, float], None]

_EXACT = 1024
"""Shorter side up to which a matrix is decomposed whole, though few directions are wanted."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many directions of each matrix are kept: a number, a share of the energy, or both."""

    rank: int | None = None
    """At most so many."""

    energy: float | None = None
    """As few as hold this share of the change's squared norm, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise RecipeError("No size is named; add --rank 16, or --energy 0.95, or both.")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"--rank {self.rank}: an adapter needs a rank of 1 at least.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"--energy {self.energy:g}: give a share above 0 and up to 1.")

    def cut(self, change: Tensor, *, seed: int) -> Factors:
        """Return the singular triplets of a change [O, I] that are kept, one at least."""
        if self.energy is None and self.rank is not None and min(change.shape) > _EXACT:
            return sketched_svd(change, self.rank, seed=seed)
        factors = decomposed(change, seed=seed)
        count = len(factors.values) if self.rank is None else self.rank
        if self.energy is not None:
            held = factors.values.square().cumsum(0)
            # rounding must not ask for one direction more than there are
            enough = self.energy * factors.norm**2 * (1 - 1e-12)
            count = min(count, int((held < enough).sum()) + 1)
        return factors.top(max(1, count))


@dataclass(frozen=True, slots=True)
class _Cut:
    """A matrix' change as factors."""

    rank: int
    missed: float
    """Norm of what the factors do not hold."""
    norm: float
    """Norm of the change."""
    tensors: Mapping[str, Tensor]
    """The factors by key."""


def extract_adapter(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    size: Size,
    whole: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    dtype: FactorDtype = "float32",
    on_step: OnStep | None = None,
) -> Manifest:
    """Write `out`, a PEFT folder that turns `base` into `expert`, and return its manifest.

    The manifest's `extract` says for every tensor what was done and its error: the norm of what is
    missed over that of the change. whole, leave_out: patterns of tensors to keep as they are, or to
    leave at the base's. Factors are held in memory until all are made.

    Raises:
        CheckpointError: checkpoints that cannot be read, or do not fit each other.
        PlanError: nothing changed, or a change that no adapter can hold.
        RecipeError: a pattern that matches nothing.
        OutputError: `out` exists or cannot be written.
    """
    began = time.perf_counter()
    require_free_name(Path(out).resolve())
    first = open_checkpoint(base)
    second = open_checkpoint(expert, base=first)
    layout = make_layout(first, second, whole=whole, leave_out=leave_out)
    cuts = _cut_all(first, second, layout, size, getattr(torch, dtype), on_step)
    kept = {key: _as_kept(second.spec(name), first) for name, key in layout.kept.items()}
    specs = [TensorSpec(k, t.dtype, tuple(t.shape)) for c in cuts.values() for k, t in
             c.tensors.items()]  # fmt: skip
    specs += [TensorSpec(key, spec.dtype, spec.shape) for key, spec in kept.items()]
    inputs = [
        InputFile(path=str(file), hash=hash_file(file), bytes=file.stat().st_size)
        for file in dict.fromkeys((*first.files, *second.files))
    ]
    config = new_config(
        base=str(Path(base).resolve()),
        ranks={layout.treatments[name].module: cut.rank for name, cut in cuts.items()},
        targets=layout.targets,
        whole=layout.modules,
        fan_in_fan_out=any(layout.treatments[name].kind == "turned" for name in cuts),
        biases=layout.biases,
        task=layout.task,
    )
    about = _described(first, second, layout, cuts)
    with CheckpointWriter(
        Path(out),
        [ShardLayout(ADAPTER_WEIGHTS[0], tuple(specs))],
        metadata={"format": "pt"},
        key=f"extract-{size}-{'-'.join(file.hash for file in inputs)}",
    ) as writer:
        for cut in cuts.values():
            for key, tensor in cut.tensors.items():
                writer.write(key, 0, tensor.reshape(-1))
        for name, key in layout.kept.items():
            writer.write(key, 0, second.read(name).to(kept[key].dtype))
        writer.add_file(ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        return writer.commit(
            {
                "recipe": {},
                "extract": {
                    "base": str(base),
                    "expert": str(expert),
                    "rank": size.rank,
                    "energy": size.energy,
                    **about,
                },
                "inputs": inputs,
                "tensors": len(specs),
                "tensors_changed": len(cuts) + len(layout.kept),
                "seed": 0,
                "versions": versions(),
                "directory": str(Path.cwd()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )


def _cut_all(
    base: Checkpoint,
    expert: Checkpoint,
    layout: Layout,
    size: Size,
    dtype: torch.dtype,
    on_step: OnStep | None,
) -> dict[str, _Cut]:
    names = [name for name, how in layout.treatments.items() if how.is_cut]
    total = sum(base.spec(name).numel for name in names)
    cuts: dict[str, _Cut] = {}
    done = 0
    for name in names:
        cuts[name] = _cut(base, expert, name, layout.treatments[name], size, dtype)
        done += base.spec(name).numel
        if on_step is not None:
            on_step("extract", done, total)
    return cuts


def _cut(
    base: Checkpoint, expert: Checkpoint, name: str, how: Treatment, size: Size, dtype: torch.dtype
) -> _Cut:
    """Return the change of one tensor as the factors B [O, r] and A [r, I] of its module."""
    shape = base.spec(name).shape
    change = _change(base, expert, name).view(shape[0], -1)
    if how.is_turned:
        change = change.T
    factors = size.cut(change, seed=random_key(0, name, 0))
    roots = factors.values.sqrt()  # both factors of one size, so that neither overflows
    left, right = ((side * roots).to(dtype) for side in (factors.left, factors.right))
    missed = frobenius(change - left.double() @ right.double().T)
    if not torch.isfinite(left).all() or not torch.isfinite(right).all():
        raise PlanError(
            f"{name}: the factors overflow {dtype}; store them as --dtype bfloat16 or float32."
        )
    b, a = left, right.T
    if how.kind == "matrix" and len(shape) > 2:  # a convolution: B looks at single places
        a = a.reshape(-1, *shape[1:])
        b = b.reshape(*b.shape, *[1] * (len(shape) - 2))
    stem = f"{PREFIX}{how.module}"
    keys = (
        (f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B")
        if how.kind == "embedding"
        else (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
    )
    tensors = dict(zip(keys, (a.contiguous(), b.contiguous()), strict=True))
    return _Cut(len(roots), missed, factors.norm, tensors)


def _as_kept(spec: TensorSpec, base: Checkpoint) -> TensorSpec:
    """Return how a tensor kept whole is stored: as it is, unless it was computed in float64."""
    wide = spec.dtype == torch.float64
    if wide and spec.name in base and base.spec(spec.name).dtype != torch.float64:
        return replace(spec, dtype=torch.float32)
    return spec


def _change(base: Checkpoint, expert: Checkpoint, name: str) -> Tensor:
    """Return what the expert adds to a tensor, in float64."""
    change = expert[name].to(torch.float64) - base[name].to(torch.float64)
    if not bool(torch.isfinite(change).all()):
        raise CheckpointError(
            f"{expert.path}: {name} or the base's holds NaN or Inf; repair the file, or leave the "
            f"tensor out (--leave-out {name})."
        )
    return change


def _described(
    base: Checkpoint, expert: Checkpoint, layout: Layout, cuts: Mapping[str, _Cut]
) -> dict[str, Any]:
    """Return what was done with each tensor, and the error of it all."""
    left_out = {name: frobenius(_change(base, expert, name)) for name in layout.left_out}
    missed = sum(cut.missed**2 for cut in cuts.values()) + sum(n**2 for n in left_out.values())
    wholes = [name for name in layout.kept if name in base]
    norm = sum(cut.norm**2 for cut in cuts.values()) + sum(n**2 for n in left_out.values())
    norm += sum(frobenius(_change(base, expert, name)) ** 2 for name in wholes)
    return {
        "error": _rounded((missed / norm) ** 0.5 if norm else 0.0),
        "tensors": {
            name: {"rank": cut.rank, "error": _rounded(cut.missed / cut.norm)}
            for name, cut in cuts.items()
        },
        "whole": list(layout.kept),
        "left_out": list(left_out),
    }


def _rounded(share: float) -> float:
    return float(f"{share:.6g}")
