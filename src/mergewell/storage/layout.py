"""Layout: which files a checkpoint is written to, and what each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergewell.storage.base import Shard
from mergewell.storage.shard_writer import ShardLayout
from mergewell.storage.spec import TensorSpec


def shard_layouts(
    shards: Sequence[Shard], specs: Mapping[str, TensorSpec], limit: int | None = None
) -> tuple[ShardLayout, ...]:
    """Return the files to write the tensors of `specs` to, in the order of `shards`.

    As many as there are shards, or filled up to `limit` bytes each; a larger tensor stands alone.
    """
    groups = [[specs[name] for name in shard.names if name in specs] for shard in shards]
    if limit is not None:
        return filled_layouts([spec for group in groups for spec in group], limit)
    return _named([group for group in groups if group])


def filled_layouts(specs: Sequence[TensorSpec], limit: int) -> tuple[ShardLayout, ...]:
    """Return files filled in order up to `limit` bytes each; a larger tensor stands alone."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    return _named([group for group in groups if group])


def _named(groups: Sequence[Sequence[TensorSpec]]) -> tuple[ShardLayout, ...]:
    if len(groups) == 1:
        return (ShardLayout("model.safetensors", tuple(groups[0])),)
    return tuple(
        ShardLayout(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    )
