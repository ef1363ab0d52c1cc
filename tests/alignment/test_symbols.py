"""Symbols by hand: how dimensions are split, cut and tied."""

from __future__ import annotations

from mergewell.alignment.symbols import (
    UNEVEN,
    Symbol,
    cut,
    factored,
    fix,
    leaves,
    monomials,
    product,
    total,
    unify,
)


def shape(symbol: Symbol) -> object:
    symbol = symbol.found()
    if symbol.kind == "leaf":
        return symbol.size
    return (symbol.kind, *(shape(part) for part in symbol.parts))


def test_a_leaf_takes_the_structure_of_what_it_meets() -> None:
    leaf = Symbol(6)
    heads, width = Symbol(2), Symbol(3)
    unify(leaf, product([heads, width]))
    assert list(leaves(leaf)) == [heads, width]


def test_products_of_other_cuts_are_refined_to_common_factors() -> None:
    """4 x 6 is 2 x 12 where both are 2 x 2 x 6."""
    one, two = [Symbol(4), Symbol(6)], [Symbol(2), Symbol(12)]
    unify(product(one), product(two))
    assert shape(one[0]) == ("product", 2, 2) and shape(one[1]) == 6
    assert [leaf.size for leaf in leaves(two[1])] == [2, 6]
    assert next(leaves(one[0])) is two[0].found()


def test_sizes_without_common_factors_are_kept_in_order() -> None:
    one, two = [Symbol(4), Symbol(6)], [Symbol(8), Symbol(3)]
    unify(product(one), product(two))
    # 6 = 2 * 3 is found; 4 against 8 / 2 = 4 then fits
    assert shape(two[0]) == ("product", 4, 2)
    odd = [Symbol(9), Symbol(4)], [Symbol(6), Symbol(6)]
    unify(product(odd[0]), product(odd[1]))
    assert {leaf.fixed for part in (*odd[0], *odd[1]) for leaf in leaves(part)} == {UNEVEN}


def test_sums_are_cut_at_every_border_of_either() -> None:
    one, two = [Symbol(2), Symbol(5)], [Symbol(4), Symbol(3)]
    unify(total(one), total(two))
    assert [leaf.size for leaf in leaves(one[1])] == [2, 3]
    assert [leaf.size for leaf in leaves(two[0])] == [2, 2]


def test_a_sum_of_products_is_a_product_with_a_sum() -> None:
    """Heads times width, cut into 1 and 3 heads: the width stays one and the same."""
    heads, width = Symbol(4), Symbol(5)
    axis = product([heads, width])
    first, rest = cut(axis, [5, 15])
    assert shape(heads) == ("sum", 1, 3)
    assert list(leaves(first)) == [width] and list(leaves(rest))[-1] is width


def test_what_is_fixed_stays_fixed_when_it_is_refined() -> None:
    leaf = Symbol(6)
    fix(leaf, "because")
    outer, inner = factored(leaf, 2)
    assert (outer.found().fixed, inner.found().fixed) == ("because", "because")
    other = Symbol(3)
    unify(other, outer)
    assert other.found().fixed == "because"


def test_monomials_write_a_tensor_out() -> None:
    a, b, c, d = (Symbol(n) for n in (2, 3, 4, 5))
    axes = [product([a, total([b, c])]), d]
    assert monomials(axes) == [(a, b, d), (a, c, d)]
