import pytest
import torch

from mergewell import linalg


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_worked_example() -> None:
    # [[3, 0], [4, 5]]: A'A = [[25, 20], [20, 25]], singular values sqrt(45) and sqrt(5)
    matrix = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)
    factors = linalg.svd(matrix)
    assert factors.values.tolist() == pytest.approx([45**0.5, 5**0.5])
    assert factors.right[:, 0].abs().tolist() == pytest.approx([0.5**0.5] * 2)
    assert factors.norm == pytest.approx(50**0.5)
    # its polar factor turns by the angle of (4 - 0, 3 + 5): [[2, -1], [1, 2]] / sqrt(5)
    expected = torch.tensor([[2.0, -1.0], [1.0, 2.0]], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(linalg.polar(matrix), expected)
    torch.testing.assert_close(linalg.newton_schulz_polar(matrix), expected)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["gram", "full"])
def test_factors_give_the_matrix_back(shape, dtype, how) -> None:
    matrix = drawn(*shape, dtype=dtype)
    factors = linalg.svd(matrix, how)
    assert factors.values.dtype == factors.left.dtype == factors.right.dtype == dtype
    torch.testing.assert_close(factors.matrix(), matrix, atol=1e-5, rtol=0)
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(factors.values.double(), exact, atol=1e-5, rtol=0)
    for side in (factors.left, factors.right):
        unit = torch.eye(len(factors.values), dtype=dtype)
        torch.testing.assert_close(side.T @ side, unit, atol=1e-5, rtol=0)
    assert factors.missed == pytest.approx(0, abs=1e-3)
    top = linalg.svd(matrix, how, rank=1)
    torch.testing.assert_close(top.values, factors.values[:1])
    torch.testing.assert_close(top.matrix(), factors.top(1).matrix())
    assert top.left.untyped_storage().nbytes() == top.left.nbytes  # no view of all vectors
    assert top.right.untyped_storage().nbytes() == top.right.nbytes
    assert len(linalg.svd(matrix, how, rank=0).values) == 0


@pytest.mark.parametrize("how", ["gram", "full"])
def test_directions_that_are_not_there_are_not_made_up(how) -> None:
    matrix = drawn(20, 3) @ drawn(3, 15, seed=1)
    factors = linalg.svd(matrix, how)
    assert len(factors.values) == 3
    partial = linalg.polar(matrix, how)
    torch.testing.assert_close(partial @ partial.T @ matrix, matrix)
    assert float(torch.linalg.matrix_norm(partial)) == pytest.approx(3**0.5)
    zero = linalg.svd(torch.zeros(4, 6), how)
    assert zero.left.shape == (4, 0) and zero.right.shape == (6, 0) and zero.missed == 0
    assert torch.equal(zero.matrix(), torch.zeros(4, 6))
    assert torch.equal(linalg.polar(torch.zeros(4, 6), how), torch.zeros(4, 6))
    assert linalg.polar(torch.zeros(4, 0)).shape == (4, 0)


def test_gram_keeps_what_is_a_millionth_as_long() -> None:
    # the stated limits: values to 1e-8 of the largest, directions at the limit nearly orthonormal
    left, right = (torch.linalg.qr(drawn(40, 8, seed=s)).Q for s in (1, 2))
    lengths = torch.tensor([1, 0.5, 1e-2, 1e-3, 1e-4, 1e-5, 2e-6, 2e-7], dtype=torch.float64)
    factors = linalg.svd((left * lengths) @ right.T)
    assert len(factors.values) == 7
    torch.testing.assert_close(factors.values, lengths[:7], atol=1e-8, rtol=0)
    unit = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(factors.left.T @ factors.left, unit, atol=1e-4, rtol=0)


def test_a_sketch_finds_the_leading_directions_and_says_what_it_misses() -> None:
    matrix = drawn(80, 5) @ drawn(5, 60, seed=1) + 1e-3 * drawn(80, 60, seed=2)
    exact = linalg.svd(matrix).top(5)
    found = linalg.sketched_svd(matrix, 5, seed=3)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.matrix(), exact.matrix(), atol=1e-5, rtol=0)
    assert found.missed == pytest.approx(exact.missed, rel=1e-3)
    assert 0 < found.missed < 1e-2
    again = linalg.sketched_svd(matrix, 5, seed=3)
    assert torch.equal(found.left, again.left)
    assert not torch.equal(found.left, linalg.sketched_svd(matrix, 5, seed=4).left)
    wide = linalg.sketched_svd(matrix, 50, seed=3)  # 50 + 16 of 60: exact
    torch.testing.assert_close(wide.values, linalg.svd(matrix).values[:50])


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_newton_schulz_agrees_with_the_svd(shape) -> None:
    matrix = drawn(*shape)
    torch.testing.assert_close(linalg.newton_schulz_polar(matrix), linalg.polar(matrix))
    assert torch.equal(linalg.newton_schulz_polar(torch.zeros(shape)), torch.zeros(shape))
    few = linalg.newton_schulz_polar(matrix, steps=3)
    assert not torch.allclose(few, linalg.polar(matrix))


def test_logarithms_of_rotations_are_skew_and_give_them_back() -> None:
    skew = 0.3 * drawn(5, 6, 6)
    skew = skew - skew.mT
    logs = linalg.log_rotations(torch.linalg.matrix_exp(skew))
    torch.testing.assert_close(logs, skew)
    one = linalg.log_rotations(torch.eye(3, dtype=torch.float64)[None])
    torch.testing.assert_close(one, torch.zeros(1, 3, 3, dtype=torch.float64))


def test_gram_adds_up_slices_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = drawn(33, 4, dtype=torch.float32)
    whole = matrix.double().T @ matrix.double()
    monkeypatch.setattr(linalg, "_CHUNK", 20)
    torch.testing.assert_close(linalg.gram(matrix), whole)
    assert linalg.gram(matrix).dtype == torch.float64
