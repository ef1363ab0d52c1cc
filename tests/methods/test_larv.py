from dataclasses import replace

import torch
from task_matrices import drawn

from mergewell.methods.larv import Larv
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.tensor_group import TensorGroup


def groups(count: int = 6) -> list[TensorGroup]:
    """Layers whose first expert changes along ever more directions."""
    made: list[TensorGroup] = []
    for layer in range(count):
        base = drawn(8, 9, seed=layer)
        rich = drawn(8, layer + 1, seed=10 + layer) @ drawn(layer + 1, 9, seed=20 + layer)
        experts = (base + 0.1 * rich, base + 0.1 * drawn(8, 9, seed=30 + layer))
        ones = torch.ones(2, dtype=torch.float64)
        made.append(TensorGroup(f"layers.{layer}.weight", experts, ones, base))
    return made


def with_values(method: Larv, held: list[TensorGroup]) -> list[TensorGroup]:
    statistic = method.statistics()[0]
    values = statistic.measure(held)
    return [replace(group, statistics={statistic: values[group.name]}) for group in held]


def test_each_third_of_the_layers_gets_its_tier() -> None:
    method = Larv(depth_power=0.0)
    gates = [method.gates(group) for group in with_values(method, groups())]
    for expert in range(2):
        assert sorted(float(g[expert]) for g in gates) == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    # few directions, much contrast: the first expert's first layers are the ones that count
    assert float(gates[0][0]) == 1.0 > float(gates[-1][0])


def test_smooth_gates_stay_between_a_half_and_one_and_a_half() -> None:
    method = Larv(gate="smooth")
    gates = torch.stack([method.gates(group) for group in with_values(method, groups())])
    assert 0.5 < float(gates.min()) < 0.9 and 1.1 < float(gates.max()) < 1.5
    deeper = Larv(gate="smooth", depth_power=4.0)
    moved = torch.stack([deeper.gates(group) for group in with_values(deeper, groups())])
    assert float(moved[0, 0]) < float(gates[0, 0])
    torch.testing.assert_close(moved[-1], gates[-1])  # depth 1


def test_gates_multiply_the_coefficients_of_the_inner_method() -> None:
    method = Larv(of=TaskArithmetic(scale=1.0))
    for group in with_values(method, groups()):
        gated = replace(group, coefficients=method.gates(group))
        expected = TaskArithmetic(scale=1.0).merge(gated)
        torch.testing.assert_close(method.merge(group), expected)
    bias = TensorGroup("layers.0.bias", (torch.ones(3),), torch.ones(1), torch.zeros(3))
    (vector, *_) = with_values(method, [bias, *groups()])
    assert method.merge(vector).tolist() == [1.0, 1.0, 1.0]
