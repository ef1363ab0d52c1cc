import torch
from task_matrices import drawn, group

from mergewell.methods.average import Average
from mergewell.methods.cart import Cart


def test_worked_example() -> None:
    # the mean of diag(6, 0) and diag(0, 2) is diag(3, 1); differences diag(3, -1) and diag(-3, 1)
    # cut to one direction are diag(3, 0) and diag(-3, 0), which cancel; three experts do not
    first, second = [[6.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]
    two = Cart(density=0.5).merge(group(first, second)) - 10
    torch.testing.assert_close(two, torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double())
    # with diag(0, 1): mean diag(2, 1), differences diag(4, -1), diag(-2, 1), diag(-2, 0)
    three = group([[6.0, 0.0], [0.0, 0.0]], second, [[0.0, 0.0], [0.0, 1.0]])
    merged = Cart(density=0.5).merge(three) - 10
    torch.testing.assert_close(merged, torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double())
    # (-3, 3) is the longest of the differences of diag(0, 3), diag(6, 0), diag(3, 6)
    three = group(*(torch.diag(torch.tensor(d)) for d in ([0.0, 4.0], [9.0, 1.0], [3.0, 7.0])))
    # mean (4, 4); differences (-4, 0), (5, -3), (-1, 3); cut (-4, 0) + (5, 0) + (0, 3) = (1, 3)
    merged = Cart(density=0.5, scale=2.0).merge(three) - 10
    torch.testing.assert_close(merged, torch.diag(torch.tensor([6.0, 10.0])).double())


def test_all_directions_or_no_scale_is_the_average() -> None:
    tensors = group(*(drawn(6, 4, seed=s) for s in range(3)), coefficients=[1.0, 2.0, 3.0])
    average = Average().merge(tensors)
    torch.testing.assert_close(Cart(scale=0.0).merge(tensors), average)
    equal = group(*(drawn(6, 4, seed=s) for s in range(3)))
    torch.testing.assert_close(Cart(density=1.0).merge(equal), Average().merge(equal))


def test_needs_no_base_and_averages_the_rest() -> None:
    assert not Cart().needs.base
    assert Cart().for_tensor("lm_head.weight", shape=(4, 4), guided=False) == Average()
    vectors = group(drawn(5, seed=1), drawn(5, seed=2))
    torch.testing.assert_close(Cart(scale=3.0).merge(vectors), Average().merge(vectors))
    doubled = group(drawn(6, 4, seed=1), drawn(6, 4, seed=2), coefficients=[2.0, 2.0])
    same = group(drawn(6, 4, seed=1), drawn(6, 4, seed=2))
    torch.testing.assert_close(Cart().merge(doubled), Cart().merge(same))
    assert Cart().objection([1.0, -1.0])
