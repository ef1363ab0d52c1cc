"""Models by name, each made when it is asked for, so that one is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from mergewell.errors import ModelError
from mergewell.models.loader import ModuleSource, load_state
from mergewell.opening import open_model


class Models(Mapping[str, nn.Module]):
    """Modules of files and folders of weights, by the names that they are given."""

    def __init__(
        self, paths: Mapping[str, str], *, base: str | None = None, model_factory: str | None = None
    ) -> None:
        """Open the files; `base` is that of adapters and task vectors among them.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        under = open_model(base, ()) if base is not None else None
        self._opened = {name: open_model(path, (), base=under) for name, path in paths.items()}
        self._factory = model_factory
        self._base = [under.path] if under is not None else []

    @property
    def folder(self) -> Path | None:
        """The first folder among the models, whose tokenizer reads texts."""
        paths = (model.path for model in self._opened.values())
        return next((path for path in paths if path.is_dir()), None)

    def __getitem__(self, name: str) -> nn.Module:
        """Return a new module with this model's weights.

        Raises:
            ModelError: nothing says what the architecture is, or the weights do not fit it.
        """
        checkpoint = self._opened[name]
        homes = (path for path in (checkpoint.path, *self._base))
        home = next((path for path in homes if (path / "config.json").is_file()), None)
        if self._factory is None and home is None:
            raise ModelError(
                f"{checkpoint.path} is no Hugging Face folder, so --model-factory PKG:FUNC (or "
                "timm:NAME) is needed, which makes the module that takes these weights."
            )
        module = ModuleSource.parse(self._factory or str(home)).build()
        load_state(module, checkpoint)
        return module

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)
