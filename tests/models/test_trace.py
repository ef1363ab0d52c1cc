"""Tracing: every way to write an activation is found, and everything else is named."""

import math
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mergewell.errors import ModelError
from mergewell.models.trace import Trace, trace


class Net(nn.Module):
    """A linear layer, a given function of its output, and a second linear layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.function = function
        self.second = nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.sigmoid(x)


def run(module: nn.Module, *shape: int) -> Trace:
    torch.manual_seed(0)
    found = trace(module, torch.randn(*(shape or (2, 6))))
    accounted = {layer.layer for layer in found.covered} | set(found.uncovered)
    accounted |= {b.layer for layer in found.covered for b in layer.branches}
    accounted |= {b.batch_norm for layer in found.covered for b in layer.branches if b.batch_norm}
    owners = {n for n, m in module.named_modules() if list(m.parameters(recurse=False))} - {""}
    assert owners <= accounted  # nothing is skipped silently
    return found


WRITTEN = {
    "relu module": (nn.ReLU(), "relu"),
    "relu function": (F.relu, "relu"),
    "relu in place": (nn.ReLU(inplace=True), "relu"),
    "relu inline": (lambda z: torch.clamp(z, min=0), "relu"),
    "relu of max": (lambda z: torch.maximum(z, torch.zeros_like(z)), "relu"),
    "relu of a constant": (lambda z: torch.maximum(z, torch.tensor(0.0)), "relu"),
    "relu6 module": (nn.ReLU6(), "relu6"),
    "relu6 function": (F.relu6, "relu6"),
    "relu6 in place": (lambda z: F.relu6(z, inplace=True), "relu6"),
    "relu6 inline": (lambda z: z.clamp(0, 6), "relu6"),
    "leaky module": (nn.LeakyReLU(0.2), "leaky_relu"),
    "leaky function": (lambda z: F.leaky_relu(z, 0.2), "leaky_relu"),
    "leaky inline": (lambda z: torch.where(z > 0, z, 0.2 * z), "leaky_relu"),
    "gelu module": (nn.GELU(), "gelu"),
    "gelu function": (F.gelu, "gelu"),
    "gelu inline": (lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))), "gelu"),
    "gelu tanh module": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "gelu tanh function": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "gelu tanh inline": (
        lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "gelu_tanh",
    ),
    "quick gelu inline": (lambda z: z * torch.sigmoid(1.702 * z), "quick_gelu"),
    "silu module": (nn.SiLU(), "silu"),
    "silu function": (F.silu, "silu"),
    "silu inline": (lambda z: z * torch.sigmoid(z), "silu"),
    "silu autograd": (Swish.apply, "silu"),
    "silu mul_": (lambda z: z.mul_(z.sigmoid()), "silu"),
    "through views": (lambda z: F.gelu(z.view(5, 2)).view(2, 5), "gelu"),
    "through a transpose": (lambda z: F.silu(z.t()).t(), "silu"),
    "in place through a view": (lambda z: z.view(-1).relu_().view(2, 5), "relu"),
    "in place on the base of a view": (lambda z: (z.detach().relu_(), z)[1], "relu"),
    "dropout after": (nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), "tanh"),
    "constant changed later": (
        lambda z: (lambda c: (torch.sin(z * c), c.add_(1))[0])(torch.tensor(2.0)),
        "custom",
    ),
    "own": (lambda z: torch.sin(z), "custom"),
    "two": (lambda z: torch.tanh(F.relu(z)), "custom"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_every_way_to_write_an_activation_is_found(case: str) -> None:
    function, name = WRITTEN[case]
    found = run(Net(function))
    (layer,) = found.covered
    assert (layer.layer, layer.nodes, layer.node_dim) == ("first", 5, -1)
    assert layer.activation.name == name
    assert layer.activation.slope == pytest.approx(0.2 if name == "leaky_relu" else 0)
    z = torch.randn(2, 5, dtype=torch.float64)
    wanted = function.eval()(z.clone()) if isinstance(function, nn.Module) else function(z.clone())
    torch.testing.assert_close(layer.activation(z), wanted)
    assert found.uncovered == {"second": "is the network's output"}


def test_the_module_comes_back_as_it_was_and_a_trace_can_be_pickled() -> None:
    net = Net(nn.Sequential(nn.GELU(), nn.Dropout(0.5)))
    net.second.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = run(net)
    assert net.training and net.function.training and not net.second.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    again = pickle.loads(pickle.dumps(found))
    z = torch.randn(3, 5)
    assert torch.equal(again.covered[0].activation(z), F.gelu(z))


def test_casts_of_the_network_do_not_cost_precision_in_the_replay() -> None:
    (layer,) = run(Net(lambda z: F.gelu(z.double()).float())).covered
    z = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.activation(z), F.gelu(z), rtol=0, atol=0)


def test_inference_tensors_can_be_traced() -> None:
    with torch.inference_mode():
        net, x = Net(F.gelu), torch.randn(2, 4, 6)
    found = trace(net, x)
    assert [layer.activation.name for layer in found.covered] == ["gelu"]


class Block(nn.Module):
    """A residual block with BatchNorm whose one activation module serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.norm_a(self.a(x)))
        y = self.act(self.norm_b(self.b(y)))
        return self.act(self.norm_c(self.c(y)) + x)


def test_convolutions_through_batch_norm_and_a_shared_activation() -> None:
    found = run(Block(), 2, 4, 5, 5)
    assert [(x.layer, x.batch_norm, x.node_dim, x.nodes) for x in found.covered] == [
        ("a", "norm_a", 1, 4),
        ("b", "norm_b", 1, 4),
    ]
    assert {x.activation.name for x in found.covered} == {"relu"}
    assert found.uncovered["c"] == "feeds a residual sum"
    assert "normalisation" in found.uncovered["norm_c"]


def test_a_batch_norm_that_is_not_the_layer_s_alone() -> None:
    class Seen(nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.function = function

        def forward(self, x):
            return self.function(self, x)

    twice = run(Seen(lambda m, x: F.relu(m.norm(m.b(F.relu(m.norm(m.a(x))))))))
    assert "norm is called more than once" in twice.uncovered["a"]
    returned = run(Seen(lambda m, x: (lambda z: (z, F.relu(m.norm(z))))(m.a(x))))
    assert "normalisation (batch_norm)" in returned.uncovered["a"]


def test_a_batch_norm_that_holds_its_activation() -> None:
    class NormAct(nn.BatchNorm1d):
        def forward(self, x):
            return F.silu(super().forward(x))

    net = nn.Sequential(nn.Linear(6, 4), NormAct(4), nn.Linear(4, 2))
    (layer,) = run(net).covered
    assert (layer.layer, layer.batch_norm, layer.activation.name) == ("0", "1", "silu")


class Odd(nn.Module):
    """Whatever a function makes of a few layers and parameters."""

    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.norm, self.prelu = nn.LayerNorm(6), nn.PReLU()
        self.table = nn.Embedding(2, 6)
        self.unused = nn.Linear(6, 6)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


REASONS = {
    "residual": (lambda m, x: m.c(F.relu(m.a(x) + x)), "feeds a residual sum"),
    "gated": (
        lambda m, x: m.c(F.silu(m.b(x)) * m.a(x + 1)),
        "multiplied with another branch (gated)",
    ),
    "twice": (lambda m, x: m.c(F.relu(m.a(F.relu(m.a(x))))), "called 2 times"),
    "forward": (lambda m, x: m.c(F.relu(m.a(x)) + m.a.forward(x)), "outside its own forward"),
    "consumers": (lambda m, x: (lambda z: m.c(F.relu(z)) + z)(m.a(x)), "several consumers"),
    "attention": (lambda m, x: m.c(m.a(x) @ m.b(x).T @ x), "(attention)"),
    "norm": (lambda m, x: m.c(F.relu(m.norm(m.a(x)))), "normalisation (layer_norm)"),
    "scaled": (lambda m, x: m.c(F.relu(m.a(x) * m.scale)), "meets parameters or buffers of scale"),
    "prelu": (lambda m, x: m.c(m.prelu(m.a(x))), "meets parameters or buffers of prelu"),
    "next": (lambda m, x: m.c(2 * m.a(x)), "feeds c with no activation in between"),
    "split": (lambda m, x: m.c(torch.cat(m.a(x).chunk(2, -1)[::-1], -1).relu()), "split"),
    "softmax": (lambda m, x: m.c(m.a(x).softmax(-1)), "feeds softmax"),
    "functional": (lambda m, x: m.c(F.relu(F.linear(x, m.a.weight))), "outside its own forward"),
    "mixed views": (lambda m, x: m.c((lambda z: z * z.T.sigmoid())(m.a(x))), "another branch"),
    "masked": (lambda m, x: m.c(m.a(x).masked_fill(x > 0, 0.0).relu()), "masked_fill"),
    "dead end": (lambda m, x: (m.a(x), m.c(x))[1], "does not reach the network's output"),
    "written": (lambda m, x: (lambda z: (z[:, :2].zero_(), m.c(F.relu(z)))[1])(m.a(x)), "written"),
    "not reached": (lambda m, x: m.c(x), "not reached by the forward pass"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_covered_is_named_with_its_reason(case: str) -> None:
    function, words = REASONS[case]
    found = run(Odd(function), 6, 6)
    assert "a" not in [layer.layer for layer in found.covered]
    assert words in found.uncovered["a"]
    assert found.uncovered["unused"] == "not reached by the forward pass"
    assert "scale" in found.uncovered


def test_an_activation_with_several_consumers_is_covered() -> None:
    def forward(m: Odd, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        assert (y > -1).all()  # a look at the values is no consumer
        return m.c(y) + 0.5 * y

    found = run(Odd(forward), 6, 6)
    assert [(x.layer, x.activation.name) for x in found.covered] == [("a", "relu")]


def test_embeddings_and_bare_parameters_are_named() -> None:
    def forward(m: Odd, x: torch.Tensor) -> torch.Tensor:
        return m.c(F.relu(m.a(m.table((x > 0).long()[:, 0]) + m.scale)))

    found = run(Odd(forward), 6, 6)
    assert found.uncovered["table"] == "a table of embeddings, not a linear layer"
    assert "in add" in found.uncovered["scale"]


def test_tied_weights_belong_to_the_layer_that_uses_them() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    assert [layer.layer for layer in run(net).covered] == ["0", "2"]
    lender = nn.ModuleDict(
        {"inner": nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "shared": nn.Linear(6, 6)}
    )
    lender["shared"].weight, lender["shared"].bias = (
        lender["inner"][0].weight,
        lender["inner"][0].bias,
    )
    lender.forward = lambda x: lender["inner"](x)
    assert run(lender).uncovered == {"shared": "only lends its parameters to inner.0"}


def test_torch_transformer_layers_are_seen_in_spite_of_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    found = run(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), 2, 5, 8)
    names = [(x.layer, x.activation.name, x.nodes) for x in found.covered]
    assert names == [("layers.0.linear1", "gelu", 16), ("layers.1.linear1", "gelu", 16)]
    assert "outside" in found.uncovered["layers.0.self_attn.out_proj"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_layouts() -> None:
    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x):
            return torch.bmm(x, self.weight)

    transposed_input = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    assert run(transposed_input, 2, 3, 6).covered[0].node_dim == -1
    turned = trace(transposed_input, torch.randn(6, 3, 2).transpose(0, 2))
    assert [layer.layer for layer in turned.covered] == ["0"]
    wrong_dim = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(5), nn.ReLU())
    assert "another dimension" in run(wrong_dim, 2, 5, 6).uncovered["0"]
    assert "more than" in run(nn.Sequential(Turned(6, 4), nn.ReLU()), 2, 4, 6).uncovered["0"]
    assert "batch of matrices" in run(nn.Sequential(Experts(), nn.ReLU()), 3, 2, 6).uncovered["0"]
    deconvolution = nn.Sequential(nn.ConvTranspose1d(4, 7, 3), nn.ELU())
    (layer,) = run(deconvolution, 2, 4, 9).covered
    assert (layer.node_dim, layer.nodes, layer.activation.name) == (1, 7, "elu")


def test_results_may_be_nested() -> None:
    @dataclass
    class Answer:
        features: dict[str, list[torch.Tensor]]

    found = run(Odd(lambda m, x: Answer({"y": [m.c(F.relu(m.a(x)))]})), 6, 6)
    assert [layer.layer for layer in found.covered] == ["a"]


def test_a_module_without_results_is_an_error() -> None:
    class Silent(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ModelError, match="Silent returned no tensor"):
        trace(Silent(), torch.randn(2, 6))


def test_minilm_intermediate_layers_are_gelu(minilm_folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(minilm_folder, add_pooling_layer=False)
    batch = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12)}
    batch["attention_mask"][0, 8:] = 0
    found = trace(model, batch)
    wanted = [(f"encoder.layer.{i}.intermediate.dense", "gelu", 1536) for i in range(6)]
    assert [(x.layer, x.activation.name, x.nodes) for x in found.covered] == wanted
    assert "attention" in found.uncovered["encoder.layer.0.attention.self.query"]
    assert found.uncovered["encoder.layer.5.output.dense"] == "feeds a residual sum"


def test_efficientnet_lite_convolutions_are_relu6_through_batch_norm(efficientnet) -> None:
    found = trace(efficientnet, torch.randn(1, 3, 64, 64))
    names = {name for name, part in efficientnet.named_modules() if isinstance(part, nn.Conv2d)}
    projections = {name for name in names if "project" in name}
    assert {layer.layer for layer in found.covered} == names - projections
    assert len(names) == 49 and len(projections) == 16
    assert all(x.activation.name == "relu6" and x.batch_norm for x in found.covered)
    assert all("feeds" in found.uncovered[name] for name in projections)
