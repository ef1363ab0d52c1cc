import math

import pytest
import torch
from task_matrices import drawn

from mergewell.methods.orthomerge import Orthomerge
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.tensor_group import TensorGroup


def turn(degrees: float) -> torch.Tensor:
    a = math.radians(degrees)
    return torch.tensor(
        [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64
    )


def group(base: torch.Tensor, *experts: torch.Tensor) -> TensorGroup:
    ones = torch.ones(len(experts), dtype=torch.float64)
    return TensorGroup("layer.weight", experts, ones, base)


def test_worked_example() -> None:
    # two rotations: Cayley forms tan(a / 2) J. Their mean has their mean length, so the merged
    # angle is that of the mean of tan 10 and tan 20 degrees; nothing is left to add
    base = torch.diag(torch.tensor([2.0, 2.0], dtype=torch.float64))
    merged = Orthomerge().merge(group(base, turn(20) @ base, turn(40) @ base))
    mean = (math.tan(math.radians(10)) + math.tan(math.radians(20))) / 2
    expected = turn(2 * math.degrees(math.atan(mean))) @ base
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)  # the ridge holds it back
    opposed = Orthomerge().merge(group(base, turn(20) @ base, turn(-20) @ base))
    torch.testing.assert_close(opposed, base, atol=1e-4, rtol=0)
    rounded = turn(-20) @ base + 1e-9 * drawn(2, 2)  # no rotation is made of what does not cancel
    opposed = Orthomerge().merge(group(base, turn(20) @ base, rounded))
    torch.testing.assert_close(opposed, base, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_one_expert_is_its_rotation_and_its_rest(shape: tuple[int, int]) -> None:
    base = drawn(*shape)
    expert = base + 0.1 * drawn(*shape, seed=1)
    whole = Orthomerge(of=TaskArithmetic(scale=1.0))
    torch.testing.assert_close(whole.merge(group(base, expert)), expert)
    rotated = Orthomerge(of=TaskArithmetic(scale=0.0)).merge(group(base, expert))
    # a rotation on the shorter side keeps the lengths of the base
    torch.testing.assert_close(torch.linalg.svdvals(rotated), torch.linalg.svdvals(base))
    assert float((rotated - base).norm()) > 0.05
    half = Orthomerge(of=TaskArithmetic(scale=0.5)).merge(group(base, expert))
    torch.testing.assert_close(half, (rotated + expert) / 2)


def test_a_base_of_little_rank_is_not_turned_where_it_has_nothing() -> None:
    base = torch.outer(drawn(5, seed=1), drawn(6, seed=2))
    expert = base + 0.01 * drawn(5, 6, seed=3)
    merged = Orthomerge(of=TaskArithmetic(scale=1.0)).merge(group(base, expert, expert))
    assert float((merged - expert).norm()) < 3 * float((expert - base).norm())


def test_inner_methods_that_need_the_whole_model_are_refused() -> None:
    method = Orthomerge.model_validate({"of": {"name": "ties", "trim_scope": "model"}})
    assert "more than the one matrix" in method.objection([1.0, 1.0])
    assert not Orthomerge.model_validate({"of": "ties"}).objection([1.0, 1.0])


def test_rotations_about_different_axes_keep_their_mean_angle() -> None:
    def about(axis: list[float]) -> torch.Tensor:
        x, y, z = axis
        skew = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
        return torch.linalg.matrix_exp(math.radians(30) * skew)

    base = 2 * torch.eye(3, dtype=torch.float64)
    experts = [about([1.0, 0.0, 0.0]) @ base, about([0.0, 1.0, 0.0]) @ base]
    merged = Orthomerge().merge(group(base, *experts))
    expected = about([0.5**0.5, 0.5**0.5, 0.0]) @ base
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
