"""Verify: is a merged folder still what its manifest says, and what its inputs give?"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from mergewell.errors import UserError
from mergewell.plan import make_plan
from mergewell.recipe import recipe_of_manifest
from mergewell.run import merge_tensors
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import (
    MANIFEST,
    InputFile,
    Manifest,
    algorithm_of,
    hash_file,
    read_manifest,
    verify_files,
)

SAMPLE = 16
"""Tensors that are made again."""


def verify_deep(folder: str | Path, *, sample: int = SAMPLE, seed: int = 0) -> list[str]:
    """Return what is wrong with a merged folder, a sentence each; nothing if all is well.

    The files are checked against the manifest, the inputs against its hashes; only if both hold,
    `sample` tensors drawn by `seed` are merged again from the inputs and compared bit for bit.

    Raises:
        CheckpointError: there is no readable manifest.
    """
    directory = Path(folder)
    manifest = read_manifest(directory)
    problems = verify_files(directory)
    # Relative paths were meant as seen from where the merge was run.
    started = Path(manifest.directory)
    problems += [
        problem
        for file in manifest.inputs
        if (problem := _input_problem(file, started, directory)) is not None
    ]
    return problems or _recompute(directory, manifest, sample, seed)


def _input_problem(file: InputFile, started: Path, folder: Path) -> str | None:
    path = started / file.path
    if not path.is_file():
        return f"The input {path} is gone."
    if path.stat().st_size != file.bytes:
        return f"The input {path} has {path.stat().st_size} bytes where {file.bytes} were merged."
    if hash_file(path, algorithm_of(file.hash, where=f"{folder / MANIFEST}: {path}")) != file.hash:
        return f"The input {path} changed: its hash is not the one in {MANIFEST}."
    return None


def _recompute(folder: Path, manifest: Manifest, sample: int, seed: int) -> list[str]:
    try:
        plan = make_plan(recipe_of_manifest(manifest, where=str(folder / MANIFEST)))
        merged = open_checkpoint(folder)
        if set(merged) != set(plan.tasks):
            return [f"The tensors in {folder} are not those that its recipe gives."]
        names = sorted(plan.tasks)
        drawn = set(random.Random(seed).sample(names, min(sample, len(names))))
        problems: list[str] = []
        for name, tensor in merge_tensors(plan, drawn):
            stored = merged[name]
            if stored.dtype != tensor.dtype or stored.shape != tensor.shape:
                problems.append(
                    f"{name} is {stored.dtype} {list(stored.shape)}, but its recipe and inputs "
                    f"give {tensor.dtype} {list(tensor.shape)}."
                )
                continue
            size = tensor.dtype.itemsize
            left, right = (t.reshape(-1).view(torch.uint8).view(-1, size) for t in (stored, tensor))
            if different := int((left != right).any(dim=1).sum()):
                problems.append(
                    f"{name} differs from what its recipe and inputs give in {different} of "
                    f"{tensor.numel()} elements."
                )
    except UserError as error:
        return [f"It cannot be made again: {error}"]
    return problems
