"""Stages: what a recipe makes, as a model of another recipe."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from threading import Lock
from typing import Any

from torch import Tensor

from mergewell.errors import PlanError
from mergewell.recipe import Recipe
from mergewell.storage.base import Checkpoint, Shard
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.spec import TensorSpec
from mergewell.storage.weight_file import WeightFile

_OF_THE_PROCESS = ("_making", "_made", "_remove")


class StageCheckpoint(Checkpoint):
    """The result of a recipe, planned when it is opened and merged when it is first read.

    It then lies in a temporary folder (TMPDIR says where) until it is closed. Its files are those
    that the recipe reads: a manifest names what was there before, and no folder that is gone.
    """

    def __init__(self, name: str, recipe: Recipe) -> None:
        """Plan the stage.

        Raises:
            PlanError: the stage has a repair, which is made of a result and not on the way.
            UserError: whatever `make_plan` finds.
        """
        from mergewell.plan import make_plan  # which opens its models, and so stages, by this

        if recipe.repair is not None:
            raise PlanError(f"stage {name}: a repair is made of the result; move it to the recipe.")
        self._plan = make_plan(recipe)
        reference = self._plan.reference
        self._reference, self.path = reference, Path(name)
        self.specs = {task.name: task.spec for task in self._plan.tasks.values()}
        self.aliases = {n: kept for n, kept in reference.aliases.items() if kept in self.specs}
        self.shards = tuple(
            Shard(layout.file, tuple(spec.name for spec in layout.specs))
            for layout in self._plan.layouts
        )
        self.files = tuple(dict.fromkeys(f for model in self._plan.inputs for f in model.files))
        self.metadata, self.config = {}, reference.config
        self.side_files = reference.side_files
        self._making = Lock()
        self._made: Checkpoint | None = None
        self._remove: Callable[[], object] | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What planning the stage warned of, and whether its place is too small."""
        found = list(self._plan.warnings)
        size, place = sum(spec.nbytes for spec in self.specs.values()), gettempdir()
        if size > (free := shutil.disk_usage(place).free):
            found.append(
                f"{size / 1e9:.1f} GB are to lie in {place} for a while, which has "
                f"{free / 1e9:.1f} GB free; let TMPDIR name a larger disk."
            )
        return tuple(f"stage {self.path}: {warning}" for warning in found)

    def weight_files(self) -> tuple[WeightFile, ...]:
        """Return the opened files of the stage's own models."""
        return tuple(file for model in self._plan.inputs for file in model.weight_files())

    def side_file(self, file: Path) -> bytes:
        """Return the bytes of a side file, as the stage would write it."""
        return self._reference.side_file(file)

    def close(self) -> None:
        """Remove what was merged, and let go of the stage's own models."""
        if self._made is not None:
            self._made.close()
        if self._remove is not None:
            self._remove()
        self._made = self._remove = None
        for model in self._plan.inputs:
            model.close()

    def _read_block(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        with self._making:  # a plain lock, one a stage: stages are made while others are
            if self._made is None:
                self._made = self._make()
        return self._made.read(spec.name, start, stop)

    def _make(self) -> Checkpoint:
        from mergewell.run import run  # which makes plans, and so stages, by this

        folder = mkdtemp(prefix="mergewell-stage-")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        run(self._plan, Path(folder) / "stage")
        return open_checkpoint(Path(folder) / "stage")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in _OF_THE_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _making=Lock(), _made=None, _remove=None)
