"""Opening the models that a recipe names: files, `MODEL+ADAPTER`, stacks of layers, stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mergewell.recipe import LayerRange, Recipe
from mergewell.stages import StageCheckpoint
from mergewell.storage.adapter import AdapterCheckpoint
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.folder import parts_of
from mergewell.storage.hub import local_path
from mergewell.storage.layer_stack import LayerPiece, LayerStack
from mergewell.tokenizers.view import VocabularyView

NO_STAGES: Mapping[str, Recipe] = MappingProxyType({})


def open_model(
    path: str,
    layers: Sequence[LayerRange],
    *,
    base: Checkpoint | None = None,
    stages: Mapping[str, Recipe] = NO_STAGES,
) -> Checkpoint:
    """Open a model, or stack ranges of layers into one; a name of `stages` is what that makes.

    `ORG/NAME@REVISION` is fetched from the Hub. `MODEL+ADAPTER` is a LoRA adapter on a model of
    its own; `base` is that of adapters, and of task vectors, which are named alone.

    Raises:
        CheckpointError: a file that is missing or damaged, or layers that it does not have.
        UserError: whatever is wrong with a stage.
    """
    if not layers:
        return _open(path, base, stages)
    paths = [piece.path if piece.path is not None else path for piece in layers]
    opened = {path: _open(path, base, stages) for path in dict.fromkeys(paths)}
    return LayerStack(
        [LayerPiece(opened[p], r.start, r.stop) for p, r in zip(paths, layers, strict=True)]
    )


def adapter_behind(checkpoint: Checkpoint) -> AdapterCheckpoint | None:
    """Return the adapter that a model is read as, if it is one, under whatever vocabulary."""
    inner = checkpoint.inner if isinstance(checkpoint, VocabularyView) else checkpoint
    return inner if isinstance(inner, AdapterCheckpoint) else None


def _open(path: str, base: Checkpoint | None, stages: Mapping[str, Recipe]) -> Checkpoint:
    if path in stages:
        own = stages[path]
        others = {name: stage for name, stage in stages.items() if name != path}
        return StageCheckpoint(path, own.model_copy(update={"stages": others | own.stages}))
    model, *adapters = parts_of(path)
    opened = (
        base
        if adapters and base is not None and Path(model).resolve() == base.path.resolve()
        else open_checkpoint(local_path(model), base=base)
        if model not in stages
        else _open(model, base, stages)
    )
    for adapter in adapters:
        opened = open_checkpoint(local_path(adapter), base=opened)
    return opened
