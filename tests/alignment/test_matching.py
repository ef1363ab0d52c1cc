"""Weight and activation matching: permuted copies are found again."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from permutable import Joined, ResNet, mlp, shaken
from torch import Tensor, nn

from mergewell.alignment.activations import correlations, match_activations, observed, unseen
from mergewell.alignment.matching import Matched
from mergewell.alignment.permutations import PermutationGraph
from mergewell.alignment.tracing import permutation_graph
from mergewell.alignment.weights import Weights, distance, match_weights
from mergewell.errors import DataError, ModelError
from mergewell.models.dataflow import Batch

pytest.importorskip("scipy")


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def two_units(first: list[float], second: list[float]) -> nn.Module:
    """Return a net of one input, two hidden units and one output."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(first)[:, None])
        net[2].weight.copy_(torch.tensor(second)[None])
    return net


def test_two_units_by_hand() -> None:
    """Products of rows: 1*2+3*0 = 2 in order, 1*1 + 2*2 + 3*3 + 0 = more when swapped."""
    reference, expert = two_units([1, 2], [3, 0]), two_units([2, 1], [0, 3])
    graph = permutation_graph(reference, torch.ones(1, 1))
    (group,) = graph.groups
    weights = Weights(graph, parameters(reference), parameters(expert))
    assert weights.value([group], graph.identity()) == 1 * 2 + 2 * 1
    matched = match_weights(graph, parameters(reference), parameters(expert))
    assert matched.permutations[group].tolist() == [1, 0]
    assert (matched.before, matched.after) == (4, 1 + 4 + 9)
    aligned = graph.permuted(parameters(expert), matched.permutations)
    assert distance(parameters(reference), aligned) == 0
    assert distance(parameters(reference), parameters(expert)) == 20**0.5


def scrambled(module: nn.Module, graph: PermutationGraph, *, seed: int) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return graph.permuted(state, graph.random(seed=seed))


def found_again(graph: PermutationGraph, module: nn.Module, state: dict[str, Tensor]) -> Matched:
    own = parameters(module)
    matched = match_weights(graph, own, {name: state[name] for name in own})
    aligned = graph.permuted(state, matched.permutations)
    for name, tensor in module.state_dict().items():  # buffers follow
        torch.testing.assert_close(aligned[name], tensor, rtol=0, atol=0)
    return matched


CASES: list[tuple[Any, Batch]] = [
    (mlp, torch.rand(2, 4, dtype=torch.float64)),
    (ResNet, torch.rand(2, 3, 8, 8, dtype=torch.float64)),
    (Joined, torch.rand(2, 2, 7, dtype=torch.float64)),
]


@pytest.mark.parametrize(("made", "batch"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_permuted_copy_is_recovered_exactly(made: Any, batch: Tensor, seed: int) -> None:
    module = shaken(made())
    graph = permutation_graph(module, batch)
    matched = found_again(graph, module, scrambled(module, graph, seed=seed))
    assert matched.after > matched.before and matched.sweeps > 1


def small_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    return shaken(transformers.LlamaForCausalLM(config))


def test_heads_are_recovered_with_their_widths() -> None:
    module = small_llama()
    graph = permutation_graph(module, {"input_ids": torch.arange(6)[None]})
    assert graph.within
    found_again(graph, module, scrambled(module, graph, seed=0))


@pytest.mark.parametrize(("made", "batch"), CASES)
def test_aligned_to_itself_nothing_moves(made: Any, batch: Tensor) -> None:
    module = shaken(made())
    graph = permutation_graph(module, batch)
    for matched in (
        match_weights(graph, parameters(module), parameters(module)),
        match_activations(graph, module, module, [torch.cat([batch, batch.flip(-1), -batch])]),
    ):
        assert graph.moved(matched.permutations) == 0 and matched.sweeps == 1


def test_every_sweep_gains_and_the_seed_decides_the_order() -> None:
    one, two = shaken(ResNet(), seed=1), shaken(ResNet(), seed=2)
    graph = permutation_graph(one, torch.rand(1, 3, 8, 8, dtype=torch.float64))
    seen: list[float] = []
    matched = match_weights(
        graph, parameters(one), parameters(two), on_sweep=lambda _, value: seen.append(value)
    )
    assert matched.before < seen[0] and seen == sorted(seen) and seen[-1] == matched.after
    before = distance(parameters(one), parameters(two))
    after = distance(parameters(one), graph.permuted(parameters(two), matched.permutations))
    # |a - b|^2 = |a|^2 + |b|^2 - 2 ab: what is gained is what the distance loses
    assert before**2 - after**2 == pytest.approx(2 * (matched.after - matched.before))
    again = match_weights(graph, parameters(one), parameters(two))
    assert all(torch.equal(again.permutations[g], matched.permutations[g]) for g in graph.groups)


@pytest.mark.parametrize(("made", "batch"), CASES)
def test_activations_recover_a_permuted_copy(made: Any, batch: Tensor) -> None:
    module, other = shaken(made()), shaken(made())
    graph = permutation_graph(module, batch)
    assert not unseen(graph)
    other.load_state_dict(scrambled(module, graph, seed=3))
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(64, *batch.shape[1:], generator=generator).double() for _ in range(2)]
    matched = match_activations(graph, module, other, data)
    aligned = graph.permuted(parameters(other), matched.permutations)
    assert distance(parameters(module), aligned) == 0


def test_correlations_by_hand() -> None:
    """Units 2x and -x against x and 3x (before the ReLU); a constant one correlates with none."""
    one, two = two_units([2, -1], [1, 1]), two_units([1, 0], [1, 1])
    graph = permutation_graph(one, torch.ones(1, 1))
    data = [torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0]])]
    found = correlations(graph, one, two, data)
    assert ("0", 0, 0) in observed(graph)
    torch.testing.assert_close(
        found["0", 0, 0], torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    )


def test_a_flattened_map_is_not_observed_twice() -> None:
    """Channels are seen after the convolution; their places after the flatten would cost E * E."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    graph = permutation_graph(net, torch.rand(1, 1, 4, 4))
    assert sorted(place[0] for place in observed(graph)) == ["0", "1"]
    assert ("2", 0, 0) in graph.outputs


def test_mistakes_are_named() -> None:
    net = two_units([1, 2], [3, 4])
    graph = permutation_graph(net, torch.ones(1, 1))
    with pytest.raises(DataError, match="no batches"):
        match_activations(graph, net, net, [])
    with pytest.raises(ModelError, match="no module '0'"):
        match_activations(graph, nn.Linear(1, 1), net, [torch.ones(1, 1)])
    with pytest.raises(DataError, match="not finite"):
        match_activations(graph, net, net, [torch.full((1, 1), torch.inf)])
    with pytest.raises(ModelError, match=r"has shape \[3, 1\].*\[2, 1\]"):
        graph.permuted({"0.weight": torch.ones(3, 1)}, graph.identity())


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    net = two_units([1, 2], [3, 4])
    graph = permutation_graph(net, torch.ones(1, 1))
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModelError, match=r"mergewell\[align\]"):
        match_weights(graph, parameters(net), parameters(net))
