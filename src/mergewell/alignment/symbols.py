"""Symbols: what runs along the dimensions of tensors, inferred as an operation at a time says.

Every dimension is a symbol. A symbol is a leaf (units that may be permuted together), a product
(heads times width, one after the other, the last running fastest) or a sum (queries, then keys,
then values). Unifying two symbols says that they are permuted alike; it refines both to a common
structure. Where no structure is common, both are fixed: kept in order, which is always sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

UNEVEN = "a reshape or a sum cuts across its units"


class Symbol:
    """What runs along a dimension; refined in place while operations are read."""

    __slots__ = ("_link", "fixed", "kind", "parts", "size")

    def __init__(self, size: int, fixed: str = "") -> None:
        """Make a leaf of `size` units, kept in order where there is a reason why."""
        self.size = size
        self.fixed = fixed
        self.kind = "leaf"
        self.parts: tuple[Symbol, ...] = ()
        self._link: Symbol | None = None

    def found(self) -> Symbol:
        """Return the symbol that stands for this one and all that it was unified with."""
        symbol = self
        while symbol._link is not None:
            symbol = symbol._link
        return symbol

    def become(self, other: Symbol) -> None:
        """Let another symbol stand for this one."""
        own, target = self.found(), other.found()
        if own is not target:
            own._link = target


def leaves(symbol: Symbol) -> Iterator[Symbol]:
    """Yield the leaves of a symbol from left to right, those that occur twice twice."""
    symbol = symbol.found()
    if symbol.kind == "leaf":
        yield symbol
    for part in symbol.parts:
        yield from leaves(part)


def monomials(symbols: Sequence[Symbol]) -> list[tuple[Symbol, ...]]:
    """Return the leaves that run together in each part of a tensor: its product written out."""
    made: list[tuple[Symbol, ...]] = [()]
    for symbol in map(Symbol.found, symbols):
        own = [(symbol,)] if symbol.kind == "leaf" else []
        if symbol.kind == "product":
            own = monomials(symbol.parts)
        elif symbol.kind == "sum":
            own = [term for part in symbol.parts for term in monomials([part])]
        made = [(*left, *right) for left in made for right in own]
    return made


def fix(symbol: Symbol, reason: str) -> None:
    """Keep a symbol's units in order, for a reason; the first reason stands."""
    for leaf in leaves(symbol):
        leaf.fixed = leaf.fixed or reason


def product(parts: Sequence[Symbol]) -> Symbol:
    """Return the symbol of dimensions one inside the other, the last running fastest."""
    factors = [f for part in parts for f in parts_of(part, "product") if f.size != 1]
    return _node("product", factors, prod(f.size for f in factors))


def total(parts: Sequence[Symbol]) -> Symbol:
    """Return the symbol of dimensions one after the other."""
    terms = [t for part in parts for t in parts_of(part, "sum") if t.size != 0]
    return _node("sum", terms, sum(t.size for t in terms))


def factored(symbol: Symbol, inner: int) -> tuple[Symbol, Symbol]:
    """Return a symbol as an outer one times an inner one of a size that divides its own."""
    outer, last = Symbol(symbol.size // inner), Symbol(inner)
    unify(symbol, product([outer, last]))
    return outer, last


def cut(symbol: Symbol, sizes: Sequence[int]) -> list[Symbol]:
    """Return the parts of a symbol, of sizes that add up to its own."""
    parts = [Symbol(size) for size in sizes]
    unify(symbol, total(parts))
    return parts


def unify(one: Symbol, two: Symbol) -> None:
    """Say that two symbols of one size are permuted alike."""
    one, two = one.found(), two.found()
    if one is two or one.size == two.size == 1:
        return
    if one.size != two.size:
        _fix_both(one, two)
    elif one.kind == "leaf":
        one.become(two)
        if one.fixed:
            fix(two, one.fixed)
    elif two.kind == "leaf":
        unify(two, one)
    elif one.kind != two.kind:
        _unify_mixed(*((one, two) if one.kind == "product" else (two, one)))
    elif one.kind == "product":
        _unify_products(one, two)
    else:
        _unify_sums(one, two)


def _unify_products(one: Symbol, two: Symbol) -> None:
    left, right = parts_of(one, "product"), parts_of(two, "product")
    while left and right:
        a, b = left.pop(), right.pop()
        if a.size == b.size:
            unify(a, b)
        elif max(a.size, b.size) % min(a.size, b.size):
            _fix_both(one, two)
            return
        elif a.size > b.size:
            outer, inner = factored(a, b.size)
            unify(inner, b)
            left += parts_of(outer, "product")
        else:
            outer, inner = factored(b, a.size)
            unify(inner, a)
            right += parts_of(outer, "product")
    one.become(two)


def _unify_sums(one: Symbol, two: Symbol) -> None:
    left, right = parts_of(one, "sum")[::-1], parts_of(two, "sum")[::-1]
    while left and right:
        a, b = left.pop(), right.pop()
        if a.size > b.size:
            first, rest = cut(a, [b.size, a.size - b.size])
            left += parts_of(rest, "sum")[::-1]
            unify(first, b)
        elif a.size < b.size:
            first, rest = cut(b, [a.size, b.size - a.size])
            right += parts_of(rest, "sum")[::-1]
            unify(first, a)
        else:
            unify(a, b)
    one.become(two)


def _unify_mixed(one: Symbol, two: Symbol) -> None:
    """Unify a product with a sum: (a + b) times w is a times w and then b times w."""
    outer, *inner = parts_of(one, "product")
    width = prod(symbol.size for symbol in inner)
    terms = parts_of(two, "sum")
    if any(term.size % width for term in terms):
        _fix_both(one, two)
        return
    pieces = cut(outer, [term.size // width for term in terms])
    for piece, term in zip(pieces, terms, strict=True):
        unify(term, product([piece, *inner]))
    two.become(one)


def _fix_both(one: Symbol, two: Symbol) -> None:
    fix(one, UNEVEN)
    fix(two, UNEVEN)


def parts_of(symbol: Symbol, kind: str) -> list[Symbol]:
    """Return the parts of a symbol of this kind, those of its parts in their place; or itself."""
    symbol = symbol.found()
    if symbol.kind != kind:
        return [symbol]
    return [inner for part in symbol.parts for inner in parts_of(part, kind)]


def _node(kind: str, parts: Sequence[Symbol], size: int) -> Symbol:
    if len(parts) == 1:
        return parts[0]
    node = Symbol(size)
    if parts:
        node.kind, node.parts = kind, tuple(parts)
    return node
