"""Cut: the places at which a network is taken apart, so that it fits into memory piece by piece.

A block is one of the repeated members of a list of modules: a transformer layer, a residual block.
What stands before, between and after the blocks is cut as well, into as few modules as possible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mergewell.models.dataflow import parts

_CHAINS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Piece:
    """Modules whose weights are in memory at the same time."""

    modules: tuple[str, ...]
    """Names, in the order in which the network holds them; the empty name is the whole network."""

    is_block: bool
    """True for a block, a piece of one module."""


def cut(module: nn.Module) -> tuple[Piece, ...]:
    """Return the pieces of a network in the order in which it holds them; together all weights.

    A member of a `ModuleList`, `Sequential` or `ModuleDict` is a block when it consists of modules
    and another member is of its class. One that holds more than half of all parameters is looked
    into instead. Modules between two blocks are one piece, so that a convolution and the BatchNorm
    behind it stay together. A network without blocks is one piece.
    """
    names = {id(part): name for name, part in parts(module)}
    blocks = {id(block) for block in _blocks(module, _weights(module) / 2)}
    if not blocks:
        return (Piece(("",), False),)
    pieces: list[Piece] = []
    between: list[str] = []
    for part in _leaves(module, blocks, set()):
        if id(part) not in blocks:
            between.append(names[id(part)])
            continue
        pieces += [Piece(tuple(between), False)] if between else []
        between = []
        pieces.append(Piece((names[id(part)],), True))
    return (*pieces, *([Piece(tuple(between), False)] if between else []))


def _blocks(module: nn.Module, largest: float) -> list[nn.Module]:
    """Return the outermost blocks that hold at most `largest` parameters."""
    found: list[nn.Module] = []
    for child in module.children():
        within = isinstance(module, _CHAINS) and _is_repeated(child, list(module.children()))
        found += [child] if within and _weights(child) <= largest else _blocks(child, largest)
    return found


def _is_repeated(child: nn.Module, siblings: Sequence[nn.Module]) -> bool:
    kinds = Counter(type(sibling) for sibling in siblings)
    composite = any(True for _ in child.children())
    return composite and kinds[type(child)] > 1 and _weights(child) > 0


def _leaves(module: nn.Module, blocks: set[int], seen: set[int]) -> list[nn.Module]:
    """Return blocks and the largest modules that hold weights but no block, each once.

    Weights of a module that holds blocks as well are in no leaf: they are fetched when used.
    """
    if id(module) in seen:
        return []
    seen.add(id(module))
    if id(module) in blocks or not any(id(part) in blocks for part in module.modules()):
        return [module] if _weights(module) else []
    return [leaf for child in module.children() for leaf in _leaves(child, blocks, seen)]


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
