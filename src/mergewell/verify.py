"""Verify: is a merged folder still what its manifest says, and what its inputs give?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergewell.errors import UserError
from mergewell.plan import make_plan
from mergewell.recipe import recipe_of_manifest
from mergewell.repair import mended, repair_again
from mergewell.run import merge_tensors
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import (
    MANIFEST,
    InputFile,
    Manifest,
    OnBytes,
    has_hash,
    read_manifest,
    repair_of,
    verify_files,
)

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, the bytes of it that are done and those there are."""

SAMPLE = 16
"""Tensors that are made again."""

_ROUNDING = 1e-4
"""How far a repaired tensor may lie from the one made again, of its largest magnitude: a network's
forward pass rounds differently from one machine to another."""

_ORDERED = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
"""Integers of the size of a dtype, whose order is that of its positive numbers."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What came out of a verification, a sentence each."""

    problems: tuple[str, ...]
    """What is wrong; nothing if all is well."""

    notes: tuple[str, ...] = ()
    """What could not be compared, or not bit for bit."""


def verify_deep(
    folder: str | Path, *, sample: int = SAMPLE, seed: int = 0, on_step: OnStep | None = None
) -> Verified:
    """Return what is wrong with a merged or repaired folder.

    The files are checked against the manifest, the inputs against its hashes; only if both hold,
    `sample` tensors drawn by `seed` are made again from the inputs and compared bit for bit. Those
    of a merge on another device, which rounds its own way, may differ by one step of their dtype;
    those that a repair measured by 1e-4 of the tensor's largest magnitude. Then a note says so.

    Raises:
        CheckpointError: there is no readable manifest.
    """
    directory = Path(folder)
    manifest = read_manifest(directory)
    total = sum(file.bytes for file in manifest.outputs)
    problems = verify_files(directory, on_bytes=_counting(on_step, "files", total))
    # Relative paths were meant as seen from where the merge was run.
    started = Path(manifest.directory)
    counted = _counting(on_step, "inputs", sum(file.bytes for file in manifest.inputs))
    problems += [
        problem
        for file in manifest.inputs
        if (problem := _input_problem(file, started, directory, counted)) is not None
    ]
    if problems:
        return Verified(tuple(problems))
    if not manifest.recipe and not repair_of(manifest):
        return Verified((), ("It was not merged by a recipe, so no tensor was made again.",))
    try:
        again = _merged if manifest.recipe else _repaired
        return again(directory, manifest, sample, seed, on_step)
    except UserError as error:
        return Verified((f"It cannot be made again: {error}",))


def _counting(on_step: OnStep | None, step: str, total: int) -> OnBytes:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_step is not None:
            on_step(step, done, total)

    return count


def _input_problem(file: InputFile, started: Path, folder: Path, on_bytes: OnBytes) -> str | None:
    path = started / file.path
    if not path.is_file():
        return f"The input {path} is gone."
    if path.stat().st_size != file.bytes:
        return f"The input {path} has {path.stat().st_size} bytes where {file.bytes} were merged."
    if not has_hash(path, file.hash, where=f"{folder / MANIFEST}: {path}", on_bytes=on_bytes):
        return f"The input {path} changed: its hash is not the one in {MANIFEST}."
    return None


def _merged(
    folder: Path, manifest: Manifest, sample: int, seed: int, on_step: OnStep | None
) -> Verified:
    """Merge a sample of the tensors again, on the CPU, and compare."""
    plan = mended(make_plan(recipe_of_manifest(manifest, where=str(folder / MANIFEST))))
    new: Mapping[str, Tensor] = plan.mended.tensors if plan.mended is not None else {}
    merged = open_checkpoint(folder)
    if set(merged) != set(plan.tasks):
        return Verified((f"The tensors in {folder} are not those that its recipe gives.",))
    drawn = _drawn([name for name in plan.tasks if name not in new], sample, seed)
    far = manifest.device != "cpu"
    counted = _counting(on_step, "tensors", sum(merged.spec(name).nbytes for name in drawn))
    compared = list(_compared(merged, merge_tensors(plan, drawn), 1 if far else 0, counted))
    notes = _torch_note(manifest) if any(one.problem for one in compared) else ()
    if far:
        count = sum(one.differing > 0 for one in compared)
        notes = (
            f"It was merged on {manifest.device} and made again on cpu, whose last bits can differ:"
            f" {count} of {len(compared)} tensors do, and one step of their dtype is allowed.",
            *notes,
        )
    rounded, beyond = _rounded(merged, new)
    problems = tuple(one.problem for one in compared if one.problem)
    return Verified((*problems, *beyond), (*notes, *rounded))


def _repaired(
    folder: Path, manifest: Manifest, sample: int, seed: int, on_step: OnStep | None
) -> Verified:
    """Compare a repaired folder with the merged one that it was made of, and repair that again."""
    about = repair_of(manifest)
    origin, here = open_checkpoint(about["of"]), open_checkpoint(folder)
    if set(here) != set(origin):
        return Verified((f"The tensors in {folder} are not those in {about['of']}.",))
    changed: list[str] = sorted(about["tensors"])
    drawn = _drawn([name for name in here if name not in changed], sample, seed)
    counted = _counting(on_step, "tensors", sum(here.spec(name).nbytes for name in drawn))
    kept = ((name, origin[name]) for name in origin if name in drawn)
    problems = [one.problem for one in _compared(here, kept, 0, counted) if one.problem]
    again = repair_again(manifest)
    if again is None:
        note = (
            f"The manifest does not tell on which inputs {len(changed)} tensors were repaired, so "
            "these were not made again."
        )
        return Verified(tuple(problems), (note,))
    if sorted(again) != changed:
        problems.append(f"Repairing {about['of']} again changes other tensors than in {folder}.")
    rounded, beyond = _rounded(here, again)
    return Verified((*problems, *beyond), rounded)


def _rounded(
    stored: Checkpoint, again: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a note on repaired tensors that differ by rounding, and problems of those beyond."""
    differing = 0
    problems: list[str] = []
    for name in sorted(again.keys() & set(stored)):
        one, other = stored[name].double(), again[name].double()
        differing += not torch.equal(one, other)
        if one.shape != other.shape:
            problems.append(f"{name} is {list(one.shape)}, but its repair {list(other.shape)}.")
        elif bool(((one - other).abs() > _ROUNDING * other.abs().max()).any()):
            problems.append(f"{name} differs from what its inputs give when they are run again.")
    if problems or not differing:
        return (), tuple(problems)
    return (
        f"{differing} repaired tensors differ from those made again by rounding, at most "
        f"{_ROUNDING:g} of the largest magnitude.",
    ), ()


def _drawn(names: Iterable[str], sample: int, seed: int) -> set[str]:
    ordered = sorted(names)
    return set(random.Random(seed).sample(ordered, min(sample, len(ordered))))


@dataclass(frozen=True, slots=True)
class _Compared:
    differing: int
    problem: str = ""


def _compared(
    stored: Checkpoint, made: Iterable[tuple[str, Tensor]], steps: int, on_bytes: OnBytes
) -> Iterator[_Compared]:
    """Compare stored tensors with those made again, bit for bit or up to `steps` steps."""
    for name, tensor in made:
        found = stored[name]
        on_bytes(tensor.nbytes)
        if found.dtype != tensor.dtype or found.shape != tensor.shape:
            yield _Compared(
                1,
                f"{name} is {found.dtype} {list(found.shape)}, but its recipe and inputs give "
                f"{tensor.dtype} {list(tensor.shape)}.",
            )
            continue
        beyond = elements_apart(found, tensor, steps)
        by = " by more than one step" if steps else ""
        problem = (
            f"{name} differs from what its recipe and inputs give{by} in {beyond} of "
            f"{tensor.numel()} elements."
        )
        differing = beyond if not steps else elements_apart(found, tensor, 0)
        yield _Compared(differing, problem if beyond else "")


def elements_apart(one: Tensor, other: Tensor, steps: int) -> int:
    """Return how many elements lie further apart than so many steps of their dtype.

    A step is from one number to the next that the dtype can hold; +0 and -0 are one number unless
    bits are compared (`steps` 0), which is done for dtypes of 8 bits and integers too.
    """
    if steps == 0 or one.dtype not in _ORDERED:
        size = one.dtype.itemsize
        left, right = (t.reshape(-1).view(torch.uint8).view(-1, size) for t in (one, other))
        return int((left != right).any(dim=1).sum())
    kind = _ORDERED[one.dtype]
    places: list[Tensor] = []
    for tensor in (one, other):
        bits = tensor.reshape(-1).view(kind).to(torch.int64)
        magnitude = bits & torch.iinfo(kind).max
        places.append(torch.where(bits < 0, -magnitude, magnitude))
    return int(((places[0] - places[1]).abs() > steps).sum())


def _torch_note(manifest: Manifest) -> tuple[str, ...]:
    before = manifest.versions.get("torch")
    if before is None or before == torch.__version__:
        return ()
    return (f"It was merged with torch {before} and is made again with {torch.__version__}.",)
