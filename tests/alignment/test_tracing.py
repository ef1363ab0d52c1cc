"""Any permutation of every group leaves what a module computes as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from permutable import Joined, ResNet, mlp, shaken
from torch import Tensor, nn
from torch.nn import functional

from mergewell.alignment.permutations import PermutationGraph
from mergewell.alignment.tracing import permutation_graph
from mergewell.models.dataflow import Batch, call, evaluating, tensors
from mergewell.models.skeleton import without_weights


def output(module: nn.Module, batch: Batch) -> Tensor:
    with evaluating([module]):
        return tensors(call(module, batch))[0]


def proved(module: nn.Module, batch: Batch, *, tolerance: float = 1e-12) -> PermutationGraph:
    """Return the graph of a module after random permutations of every group left it as it was."""
    graph = permutation_graph(module, batch)
    before, state = output(module, batch), {k: v.clone() for k, v in module.state_dict().items()}
    turned = {name: places.flip(-1) for name, places in graph.identity().items()}
    for by in (turned, *(graph.random(seed=seed) for seed in range(3))):
        module.load_state_dict(graph.permuted(state, by))
        torch.testing.assert_close(output(module, batch), before, rtol=0, atol=tolerance)
    for name in graph.groups:  # each alone moves something: no group stands for nothing
        changed = graph.permuted(state, {name: turned[name]})
        assert any(not torch.equal(changed[key], state[key]) for key in state)
    module.load_state_dict(state)
    return graph


def sizes(graph: PermutationGraph) -> list[int]:
    return sorted(group.size for group in graph.groups.values())


def test_mlp_with_batch_norm() -> None:
    graph = proved(shaken(mlp()), torch.rand(2, 4, dtype=torch.float64))
    assert sizes(graph) == [6, 8]
    held = [name for name, axes in graph.axes.items() if any(True for a in axes if a.group)]
    assert {"3.running_mean", "3.running_var", "3.weight", "2.bias", "5.weight"} <= set(held)
    assert graph.fixed == {
        "0.weight:1": "is the model's input",
        "5.weight:0": "is the model's output",
        "5.bias:0": "is the model's output",
    }


def test_residual_network_ties_blocks_and_flattens_into_blocks() -> None:
    graph = proved(shaken(ResNet()), torch.rand(2, 3, 8, 8, dtype=torch.float64))
    assert sizes(graph) == [8, 8, 12, 12, 12]
    stem = graph.axes["stem.weight"][0].group
    assert graph.axes["layers.0.conv2.weight"][0].group == stem  # added to the stem's
    flat = graph.axes["fc.weight"][1]
    assert flat.kind == "product" and [part.size for part in flat.parts] == [12, 2, 2]
    assert flat.parts[0].group == graph.axes["layers.1.short.0.weight"][0].group
    assert "positions" in graph.fixed["stem.weight:2"]


def test_joined_split_and_grouped_branches() -> None:
    graph = proved(shaken(Joined()), torch.rand(2, 2, 7, dtype=torch.float64))
    groups, width = graph.axes["norm.weight"][0].parts
    assert [part.size for part in groups.parts] == [2, 3] and width.size == 2
    # left and right groups, widths before and after, and the gated units: a pair of rows each
    assert sizes(graph) == [2, 2, 2, 3, 6]


def test_torch_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    graph = proved(shaken(layer), torch.rand(2, 5, 16, dtype=torch.float64))
    assert sizes(graph) == [2, 8, 32]


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(12).view(2, 6) * 7 % 50}


def transformer(name: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kind, architecture = name.split(":")
    made = getattr(transformers, kind)(**config)
    return shaken(getattr(transformers, architecture)(made))


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def test_llama_moves_groups_of_heads_with_their_widths(text: dict[str, Tensor]) -> None:
    """2 keys of 2 queries each: keys move whole, queries inside, values' widths in each key."""
    llama = transformer(
        "LlamaConfig:LlamaForCausalLM", **SMALL, num_key_value_heads=2, vocab_size=50
    )
    graph = proved(llama, text, tolerance=1e-5)  # its norms compute in float32
    assert sizes(graph) == [2, 2, 8, 32, 48]
    keys = graph.axes["model.layers.0.self_attn.k_proj.weight"][0].parts
    assert [part.kind for part in keys] == ["group", "fixed"]  # rotated widths keep their order
    values = graph.axes["model.layers.0.self_attn.v_proj.weight"][0].parts
    assert graph.groups[values[1].group].within == keys[0].group == values[0].group
    out = graph.axes["model.layers.0.self_attn.o_proj.weight"][1].parts
    assert [part.size for part in out] == [2, 2, 8]
    assert graph.groups[out[1].group].within == keys[0].group


def test_vit(text: dict[str, Tensor]) -> None:
    vit = transformer(
        "ViTConfig:ViTForImageClassification", **SMALL, image_size=16, patch_size=8
    )  # fmt: skip
    graph = proved(vit, torch.rand(2, 3, 16, 16, dtype=torch.float64))
    assert sizes(graph) == [4, 8, 8, 32, 48]
    assert sum(bool(group.within) for group in graph.groups.values()) == 2


def test_fused_queries_keys_and_values(text: dict[str, Tensor]) -> None:
    """GPT-2 holds [I, O] and three parts one after the other; GPT-NeoX interleaves them by head."""
    gpt2 = transformer(
        "GPT2Config:GPT2LMHeadModel", n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=8
    )
    graph = proved(gpt2, text)
    assert sizes(graph) == [4, 8, 8, 32, 128]
    fused = graph.axes["transformer.h.0.attn.c_attn.weight"][1]
    assert fused.kind == "sum" and [part.size for part in fused.parts] == [32, 32, 32]
    neox = transformer("GPTNeoXConfig:GPTNeoXForCausalLM", **SMALL, vocab_size=50)
    fused = proved(neox, text).axes["gpt_neox.layers.0.attention.query_key_value.weight"][0]
    assert fused.kind == "product" and fused.parts[0].size == 4


def test_a_model_without_weights_has_the_same_graph() -> None:
    batch = torch.rand(2, 4)
    assert permutation_graph(without_weights(mlp), batch) == permutation_graph(mlp().eval(), batch)


class Sorted(nn.Module):
    """Looks at the order of its hidden units; and has a part that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).sort(-1).values * torch.arange(4))


def test_what_cannot_be_permuted_is_named_with_the_reason() -> None:
    graph = permutation_graph(Sorted().eval(), torch.rand(2, 3))
    assert not graph.groups
    assert "sort" in graph.fixed["a.weight:0"]
    assert graph.fixed["unused.weight:0"] == "is not reached by the forward pass"


class Scored(nn.Module):
    """Softmax over heads at each width: widths must be in one order in all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 2, 4).softmax(1).flatten(1))


class Crossed(nn.Module):
    """Products of every head with every other: a width means the same in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.a(x).view(-1, 2, 4)
        return self.b(torch.bmm(heads, heads.transpose(1, 2)).flatten(1))


@pytest.mark.parametrize("made", [Scored, Crossed])
def test_widths_are_shared_by_heads_that_are_compared(made: type[nn.Module]) -> None:
    graph = proved(shaken(made()), torch.rand(2, 3, dtype=torch.float64))
    assert sizes(graph) == [2, 4] and not graph.within


class Padded(nn.Module):
    """A shortcut that pads channels with zeros, and picks every other position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 1, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = self.b(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.c(x.mean((2, 3)))


def test_channels_that_are_padded() -> None:
    graph = proved(shaken(Padded()), torch.rand(2, 2, 4, 4, dtype=torch.float64))
    assert sizes(graph) == [2, 2, 4]


class Decoder(nn.Module):
    """Grouped transposed convolution, a slope for each channel, GLU; gives a parameter back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.slopes = nn.Conv2d(2, 6, 1), nn.PReLU(6)
        self.up = nn.ConvTranspose2d(6, 8, 2, 2, groups=2)
        self.glu, self.out = nn.GLU(1), nn.Conv2d(4, 2, 1)
        self.token = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.glu(self.up(self.slopes(self.a(x))))
        return self.out(x + self.token.view(4, 1, 1)), self.token


def test_a_parameter_that_is_returned_keeps_its_order() -> None:
    graph = proved(shaken(Decoder()), torch.rand(2, 2, 4, 4, dtype=torch.float64))
    assert graph.fixed["token:0"] == graph.fixed["out.weight:1"] == "is the model's output"
    slopes = graph.axes["slopes.weight"][0]
    assert [(part.kind, part.size) for part in slopes.parts] == [("fixed", 2), ("group", 3)]


def test_a_recurrent_layer_that_torch_fuses_is_kept_in_order() -> None:
    graph = permutation_graph(nn.LSTM(4, 6, batch_first=True).eval(), torch.rand(2, 5, 4))
    assert not graph.groups and "weight_hh_l0:1" in graph.fixed


def test_a_wrong_permutation_is_noticed() -> None:
    """The proof can fail: units of one tensor alone."""
    module, batch = shaken(mlp()), torch.rand(2, 4, dtype=torch.float64)
    before = output(module, batch)
    with torch.no_grad():
        module.get_parameter("0.weight").copy_(module.get_parameter("0.weight").flip(0))
    assert (output(module, batch) - before).abs().max() > 1e-3
