"""A small model to write, and what a whole, undisturbed run makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergewell.storage.spec import TensorSpec
from mergewell.storage.writer import CheckpointWriter, ShardLayout

TENSORS = {
    "a": torch.arange(10.0).reshape(2, 5),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.arange(6).to(torch.bfloat16),
    "d": torch.empty(0, 3),
    "e": torch.tensor([True, False, True]),
}
FILES = {
    "model-00001-of-00003.safetensors": ("a", "b"),
    "model-00002-of-00003.safetensors": ("e", "c"),
    "model-00003-of-00003.safetensors": ("d",),
}
MANIFEST = {
    "recipe": {"method": "average"},
    "inputs": [],
    "tensors": 5,
    "tensors_changed": 3,
    "seed": 0,
    "versions": {},
    "seconds": 0.0,
}


class Model:
    """The model, its layouts, and a way to write it."""

    tensors = TENSORS
    manifest = MANIFEST
    layouts = tuple(
        ShardLayout(
            file, tuple(TensorSpec(n, TENSORS[n].dtype, tuple(TENSORS[n].shape)) for n in ns)
        )
        for file, ns in FILES.items()
    )

    def writer(self, directory: Path, *, resume: bool = False, key: str = "k") -> CheckpointWriter:
        return CheckpointWriter(
            directory, self.layouts, metadata={"mergewell": "toy"}, key=key, resume=resume
        )

    def write(
        self,
        directory: Path,
        *,
        resume: bool = False,
        before_commit: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Write everything and return the files that were pending."""
        with self.writer(directory, resume=resume) as writer:
            pending = [layout.file for layout in writer.pending]
            for layout in writer.pending:
                for spec in layout.specs:
                    flat, half = TENSORS[spec.name].reshape(-1), spec.numel // 2
                    writer.write(spec.name, half, flat[half:])
                    writer.write(spec.name, 0, flat[:half])
                writer.finish(layout.file)
            writer.add_file("config.json", b"{}\n")
            before_commit()
            writer.commit(MANIFEST)
        return pending


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory, model: Model) -> dict[str, bytes]:
    """Every file of an undisturbed run."""
    directory = tmp_path_factory.mktemp("expected") / "out"
    model.write(directory)
    return {file.name: file.read_bytes() for file in directory.iterdir()}
