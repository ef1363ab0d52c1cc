"""Opening a checkpoint: files, folders, indices and task vectors behind one interface."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.storage.adapter import AdapterCheckpoint, find_adapter
from mergewell.storage.base import Checkpoint, Shard
from mergewell.storage.folder import Source, find_side_files, find_source, read_config
from mergewell.storage.spec import TensorSpec
from mergewell.storage.views import TaskVectorCheckpoint, is_task_vector
from mergewell.storage.weight_file import WeightFile, open_weight_file

__all__ = ["Checkpoint", "FileCheckpoint", "Shard", "open_checkpoint"]


def open_checkpoint(path: str | Path, *, base: Checkpoint | None = None) -> Checkpoint:
    """Open a file, a Hugging Face folder or an index; adapters and task vectors need `base`.

    Known: `.safetensors`; folders and `.index.json` files as transformers saves them; `.bin`,
    `.pt`, `.pth` and `.ckpt` if they hold tensors only (also under one key `state_dict`); task
    vectors as `views.write_task_vector` makes them; LoRA adapters as PEFT saves them. Ordinary
    checkpoints make no use of `base`.

    Raises:
        CheckpointError: missing, malformed, of an unknown kind, or one that lacks its base.
    """
    adapter = find_adapter(Path(path))
    if adapter is not None:
        return AdapterCheckpoint(FileCheckpoint(adapter), base)
    opened = FileCheckpoint(Path(path))
    return TaskVectorCheckpoint(opened, base) if is_task_vector(opened) else opened


class FileCheckpoint(Checkpoint):
    """A checkpoint as it stands in its files."""

    def __init__(self, path: Path) -> None:
        """Read the headers of all files.

        Raises:
            CheckpointError: a file is missing or malformed, or files and index disagree.
        """
        source = find_source(path)
        self.path = path
        self.files = source.files
        folder = source.files[0].parent if source.where is None else _folder(path)
        self.config = read_config(folder)
        self.side_files = find_side_files(folder)
        opened = tuple(open_weight_file(file) for file in source.files)
        self._homes: dict[str, WeightFile] = {}
        aliases: dict[str, str] = {}
        metadata: dict[str, str] = {}
        for file in opened:
            for name in file.specs:
                if name in self._homes:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in both {self._homes[name].path.name} and "
                        f"{file.path.name}; remove the one that is left over."
                    )
                self._homes[name] = file
            aliases |= file.aliases
            metadata |= file.metadata
        self.specs = {name: file.specs[name] for name, file in self._homes.items()}
        self.aliases = {name: kept for name, kept in aliases.items() if name not in self.specs}
        self.metadata = metadata
        self.shards = tuple(Shard(file.path.name, tuple(file.specs)) for file in opened)
        self._check_index(source)

    def weight_files(self) -> tuple[WeightFile, ...]:
        """Return the opened files."""
        return tuple(dict.fromkeys(self._homes.values()))

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        for file in self._homes.values():
            file.close()

    def _read_block(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        return self._homes[spec.name].read(spec.name, start, stop)

    def _check_index(self, source: Source) -> None:
        if source.where is None:
            return
        folder = _folder(self.path)
        for name, file in source.where.items():
            home = self._homes.get(self.aliases.get(name, name))
            if home is None or home.path != folder / file:
                raise CheckpointError(
                    f"{self.path}: the index places tensor {name!r} in {file}, which does not "
                    "hold it; download the folder again."
                )
        for name, home in self._homes.items():
            if name not in source.where:
                raise CheckpointError(
                    f"{self.path}: {home.path.name} holds tensor {name!r}, which the index does "
                    "not list; download the folder again."
                )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
