"""Units of real architectures: what is found, and brute force on every kind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import average, made, moved
from torch import nn

from mergewell.errors import ModelError, RecipeError
from mergewell.models.capture import finished, measure_m_loss, observing
from mergewell.models.dataflow import evaluating
from mergewell.models.trace import trace
from mergewell.models.units import Kind, Unit

ALL: tuple[Kind, ...] = ("activation", "gated", "attention", "norm", "block", "output")
SHARES = [0.5, 0.3, 0.2]


def named(units, kind: str) -> list[str]:
    return [unit.name for unit in units if unit.kind == kind]


FOUND = {
    "llama": {
        "gated": ["model.layers.{}.mlp.gate_proj"],
        "attention": ["model.layers.{}.self_attn"],
        "norm": ["model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"],
        "block": ["model.layers.{}"],
    },
    "phi3": {
        "gated": ["model.layers.{}.mlp.gate_up_proj"],
        "attention": ["model.layers.{}.self_attn"],
        "block": ["model.layers.{}"],
    },
    "gpt2": {
        "activation": ["transformer.h.{}.mlp.c_fc"],
        "attention": ["transformer.h.{}.attn"],
        "block": ["transformer.h.{}"],
    },
    "bert": {
        "activation": ["encoder.layer.{}.intermediate.dense"],
        "attention": ["encoder.layer.{}.attention"],
        "block": ["encoder.layer.{}"],
    },
    "vit": {
        "activation": ["vit.layers.{}.mlp.fc1"],
        "attention": ["vit.layers.{}.attention"],
        "block": ["vit.layers.{}"],
    },
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_units_of_transformers_are_found(name: str, implementation: str) -> None:
    model, batch = made(name)
    model.set_attn_implementation(implementation)
    units = trace(model, batch).units
    for kind, patterns in FOUND[name].items():
        wanted = {pattern.format(layer) for pattern in patterns for layer in range(2)}
        found = set(named(units, kind))
        assert found == wanted if kind != "norm" else found > wanted
    assert all(unit.heads == 4 for unit in units if unit.kind == "attention")
    assert named(units, "output") == ["(output)"]


def test_the_units_of_a_residual_network_are_found() -> None:
    model, batch = made("resnet")
    units = trace(model, batch).units
    stages = "resnet.encoder.stages."
    blocks = [f"{stages}0.layers.0", f"{stages}0.layers.1", f"{stages}1.layers.0"]
    assert named(units, "block") == blocks
    assert all(u.node_dim == 1 for u in units if u.kind == "block")
    assert f"{stages}0.layers.0.layer.1.normalization" in named(units, "norm")


@pytest.mark.parametrize("name", [*FOUND, "resnet"])
def test_equal_experts_give_exactly_zero_on_every_kind(name: str) -> None:
    model, batch = made(name)
    found = trace(model, batch)
    model.train()
    experts = [copy.deepcopy(model) for _ in range(3)]
    models = {"merged": model, "base": model, "average": model}
    for mode in ("merged", "pretrained", "mean", "own"):
        for merged_layers in (False, True):
            layers = measure_m_loss(
                experts,
                found,
                batches=[batch],
                mode=mode,
                kinds=ALL,
                merged_layers=merged_layers,
                coefficients=[0.5, 0.2, 0.3],
                **models,
            )
            assert {layer.kind for layer in layers} >= set(FOUND.get(name, {}))
            assert all(layer.absolute == 0 and layer.relative == 0 for layer in layers)
            assert all(layer.heads.eq(0).all() for layer in layers if layer.heads is not None)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert model.config.use_cache if name in ("llama", "phi3", "gpt2") else True


def measured(experts, model, batch, kind: Kind, index: int = -1, **more):
    found = trace(model, batch)
    return measure_m_loss(
        experts, found, batches=[batch], kinds=[kind], coefficients=SHARES, **more
    )[index]


def node(ensemble: torch.Tensor, merged: torch.Tensor, dims=(0,)) -> torch.Tensor:
    return (ensemble.double() - merged.double()).square().mean(dims)


def mean(parts) -> torch.Tensor:
    return sum(c * part.double() for c, part in zip(SHARES, parts, strict=True))


def inputs_of(model: nn.Module, name: str, batch):
    """Return the arguments of one module's call."""
    seen = []
    hook = lambda module, args, kwargs: seen.append((args, kwargs))  # noqa: E731
    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    with evaluating([model]):
        model(**batch)
    handle.remove()
    return seen[0]


def test_swiglu_by_brute_force_and_fused_alike() -> None:
    model, batch = made("llama")
    experts = [moved(model, seed) for seed in (1, 2, 3)]
    layer = measured(experts, model, batch, "gated", mode="pretrained", base=model)
    (h,), _ = inputs_of(model, "model.layers.1.mlp", batch)
    with torch.no_grad():
        h = h[batch["attention_mask"].bool()]
        mlps = [expert.model.layers[1].mlp for expert in experts]
        gates, ups = [m.gate_proj(h) for m in mlps], [m.up_proj(h) for m in mlps]
        ensemble = mean(F.silu(g.double()) * u.double() for g, u in zip(gates, ups, strict=True))
        wanted = node(ensemble, F.silu(mean(gates)) * mean(ups))
    torch.testing.assert_close(layer.node, wanted, rtol=1e-9, atol=0)
    assert layer.activation == "swiglu" and layer.nodes == 48
    assert layer.parameters == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )

    class Fused(nn.Module):  # the same weights in one layer, split the other way round
        def __init__(self, expert: nn.Module) -> None:
            super().__init__()
            mlp = expert.model.layers[1].mlp
            self.both = nn.Linear(32, 96, bias=False)
            self.both.weight.data = torch.cat([mlp.up_proj.weight, mlp.gate_proj.weight]).detach()
            self.down = nn.Linear(48, 2)

        def forward(self, x):
            up, gate = self.both(x).chunk(2, -1)
            return self.down(up * F.silu(gate))

    fused = [Fused(expert) for expert in experts]
    unit = trace(fused[0], h).covered[0]
    same = measured(fused, fused[0], h, "gated", mode="pretrained", base=fused[0])
    torch.testing.assert_close(same.node, wanted, rtol=1e-4, atol=0)
    assert [branch.rows.start for branch in unit.branches] == [48, 0]
    gate, up = unit.matrices(fused[1])
    assert torch.equal(gate, mlps[1].gate_proj.weight) and torch.equal(up, mlps[1].up_proj.weight)


GATES = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "geglu": lambda g, u: u * F.gelu(g),
    "reglu": lambda g, u: F.relu(g).mul_(u),
    "glu": lambda g, u: torch.sigmoid(g) * u,
    "bilinear": lambda g, u: g * u,
}


@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_found(name: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.out(GATES[name](self.gate(x), self.up(x)))

    torch.manual_seed(0)
    found = trace(Gated(), torch.randn(3, 6))
    (unit,) = found.covered
    assert (unit.kind, unit.label, unit.nodes) == ("gated", name, 5)
    assert name == "bilinear" or unit.name == "gate"
    assert set(found.uncovered) == {"out"}
    gate, up = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(unit.function(gate, up), GATES[name](gate.clone(), up))


def test_a_gate_that_is_looked_at_elsewhere_is_no_unit() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            up = self.up(x)
            return self.out(F.silu(self.gate(x)) * up + up)

    found = trace(Leaky(), torch.randn(3, 6))
    assert [unit.kind for unit in found.covered] == ["activation"]  # the gate's own activation
    assert "several consumers" in found.uncovered["up"]


@pytest.mark.parametrize("dim", [1, -1])
def test_torchs_gated_linear_unit(dim: int) -> None:
    layer = nn.Conv1d(4, 6, 1) if dim == 1 else nn.Linear(4, 6)
    (unit,) = trace(nn.Sequential(layer, nn.GLU(dim)), torch.randn(2, 4, 4)).covered
    assert (unit.label, unit.nodes, [b.rows.start for b in unit.branches]) == ("glu", 3, [3, 0])
    x = torch.randn(2, 4, 4)
    torch.testing.assert_close(
        unit.contribution(nn.Sequential(layer), (x,), {}).shape, unit_shape(dim)
    )
    assert torch.equal(
        unit.contribution(nn.ModuleDict({"0": layer}), (x,), {}),
        F.sigmoid(layer(x).narrow(dim, 3, 3)) * layer(x).narrow(dim, 0, 3),
    )


def unit_shape(dim: int) -> torch.Size:
    return torch.Size([2, 3, 4] if dim == 1 else [2, 4, 3])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_by_brute_force_per_module_and_per_head(implementation: str) -> None:
    model, batch = made("llama")
    model.set_attn_implementation(implementation)
    experts = [moved(model, seed) for seed in (1, 2, 3)]
    layer = measured(experts, model, batch, "attention", mode="pretrained", base=model)
    _, kwargs = inputs_of(model, "model.layers.1.self_attn", batch)
    keep = batch["attention_mask"].bool()

    def values(module: nn.Module) -> torch.Tensor:
        """The heads' values, by hand: grouped queries, rotary positions, causal mask."""
        h, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q, k, v = (
            p(h).view(2, 7, -1, 8).transpose(1, 2)
            for p in (module.q_proj, module.k_proj, module.v_proj)
        )
        turn = lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1)  # noqa: E731
        q, k = (x * cos[:, None] + turn(x) * sin[:, None] for x in (q, k))
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
        hidden = torch.ones(7, 7).triu(1).bool() | ~keep[:, None, None]
        scores = scores.masked_fill(hidden, -1e30).softmax(-1)
        return (scores @ v.repeat_interleave(2, 1)).transpose(1, 2).reshape(2, 7, 32)

    with torch.no_grad():
        mine = [expert.model.layers[1].self_attn for expert in experts]
        middle = average(experts, SHARES).model.layers[1].self_attn
        heads = [values(m)[keep] for m in mine]
        outputs = [m.o_proj(v) for m, v in zip(mine, heads, strict=True)]
        merged = values(middle)[keep]
        wanted = node(mean(outputs), middle.o_proj(merged))
        gap = (mean(heads) - merged).square().view(-1, 4, 8).sum((0, 2))
        energy = mean(heads).square().view(-1, 4, 8).sum((0, 2))
    torch.testing.assert_close(layer.node, wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(layer.heads, (gap / energy).sqrt(), rtol=1e-3, atol=0)
    assert layer.relative > 1e-3 and layer.heads.shape == (4,)


def test_a_merged_models_own_attention_is_used_as_it_is() -> None:
    model, batch = made("llama")
    experts = [moved(model, seed) for seed in (1, 2, 3)]
    merged = average(experts, SHARES)
    plain = measured(experts, model, batch, "attention", mode="merged", merged=merged)
    own = measured(experts, model, batch, "attention", merged=merged, merged_layers=True)
    torch.testing.assert_close(own.node, plain.node, rtol=1e-4, atol=0)  # averaged twice, rounded
    torch.testing.assert_close(own.heads, plain.heads, rtol=1e-3, atol=0)
    by_base = measured(
        experts, model, batch, "attention", 0, mode="pretrained", base=model, merged=merged,
        merged_layers=True,
    )  # fmt: skip
    again = measured(experts, model, batch, "attention", 0, mode="pretrained", base=model)
    torch.testing.assert_close(by_base.heads, again.heads, rtol=1e-3, atol=0)


def test_convolution_and_batch_norm_by_brute_force() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 2, 1)).eval()
    net[1].running_mean.normal_()
    x = torch.randn(4, 3, 6, 6)
    experts = [moved(net, seed) for seed in (1, 2, 3)]
    for index, expert in enumerate(experts):
        expert[1].running_var.mul_(1 + index)
    layer = measured(experts, net, x, "activation", mode="pretrained", base=net)
    with torch.no_grad():
        z = [expert[:2](x) for expert in experts]
        wanted = node(mean(F.silu(part.double()) for part in z), F.silu(mean(z)), (0, 2, 3))
    torch.testing.assert_close(layer.node, wanted, rtol=1e-9, atol=0)
    assert layer.parameters == ("0.weight", "0.bias", "1.weight", "1.bias")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_affine_normalisations_have_no_gap_but_rounding(name: str) -> None:
    model, batch = made(name)
    experts = [moved(model, seed) for seed in (1, 2, 3)]
    found = trace(model, batch)
    layers = measure_m_loss(experts, found, batches=[batch], kinds=["norm"], merged=model)
    assert len(layers) == 5 and all(0 <= layer.relative < 1e-6 for layer in layers)


def test_a_batch_norm_alone_has_a_gap_of_its_running_variance() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(), nn.BatchNorm2d(4)).eval()
    experts = [copy.deepcopy(net) for _ in range(3)]
    for index, expert in enumerate(experts):
        expert[2].running_var.fill_(1.0 + index)
    x = torch.randn(4, 3, 5, 5)
    layer = measured(experts, net, x, "norm", mode="pretrained", base=net)
    eps = net[2].eps
    scale = mean([torch.tensor((v + eps) ** -0.5) for v in (1.0, 2.0, 3.0)])
    merged = (mean([torch.tensor(v) for v in (1.0, 2.0, 3.0)]) + eps) ** -0.5
    assert layer.relative == pytest.approx(float((scale - merged) / scale), rel=1e-5)


def test_blocks_and_the_output_by_brute_force() -> None:
    model, batch = made("vit")
    experts = [moved(model, seed) for seed in (1, 2, 3)]
    merged = moved(average(experts, SHARES), 4, 0.05)
    block = measured(experts, model, batch, "block", mode="mean", average=model)
    args, kwargs = inputs_of(model, "vit.layers.1", batch)
    final = measured(experts, model, batch, "output", mode="merged", merged=merged)
    by_base = measured(
        experts, model, batch, "output", mode="pretrained", base=model, merged=merged
    )
    with torch.no_grad():
        outputs = [expert.vit.layers[1](*args, **kwargs) for expert in experts]
        middle = average(experts, SHARES).vit.layers[1](*args, **kwargs)
        wanted = node(mean(outputs), middle, (0, 1))
        logits = mean(expert(**batch).logits for expert in experts)
        last = node(logits, merged(**batch).logits)
    torch.testing.assert_close(block.node, wanted, rtol=1e-3, atol=1e-15)
    torch.testing.assert_close(final.node, last, rtol=1e-4, atol=0)
    torch.testing.assert_close(by_base.node, last, rtol=1e-4, atol=0)


def test_own_mode_compares_whole_paths() -> None:
    model, batch = made("llama")
    experts = [moved(model, seed, 0.05) for seed in (1, 2, 3)]
    merged = average(experts, SHARES)
    found = trace(model, batch)
    layers = measure_m_loss(
        experts, found, batches=[batch], kinds=ALL, mode="own", merged=merged, coefficients=SHARES
    )
    with torch.no_grad():
        hidden = [
            m(**batch, output_hidden_states=True).hidden_states[1] for m in (*experts, merged)
        ]
        wanted = node(mean(hidden[:3]), hidden[3], (0, 1))
    (block,) = (layer for layer in layers if layer.layer == "model.layers.0")
    whole = measure_m_loss(
        experts,
        found,
        batches=[{"input_ids": batch["input_ids"]}],
        kinds=["block"],
        mode="own",
        merged=merged,
        coefficients=SHARES,
    )
    with torch.no_grad():
        hidden = [
            m(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1]
            for m in (*experts, merged)
        ]
    torch.testing.assert_close(
        whole[0].node, node(mean(hidden[:3]), hidden[3], (0, 1)), rtol=1e-3, atol=1e-15
    )
    assert ((block.node - wanted).abs() > 0.01 * wanted).any()  # padding does not count
    assert all(layer.theory is None for layer in layers)


def test_the_released_definition_on_a_vision_transformer() -> None:
    """Mode `pretrained`, tanh-GELU, the first MLP layer: papers.md 1.2.2, written anew."""
    model, batch = made("vit", hidden_act="gelu_new")
    experts = [moved(model, seed) for seed in (1, 2)]
    found = trace(model, batch)
    layers = measure_m_loss(experts, found, batches=[batch], mode="pretrained", base=model)
    assert [layer.layer for layer in layers] == ["vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"]
    for layer in layers:
        inputs: list[torch.Tensor] = []
        target = model.get_submodule(layer.layer)
        handle = target.register_forward_hook(lambda m, x, y, to=inputs: to.append(x[0]))
        with torch.no_grad():
            model(**batch)
            handle.remove()
            tokens = inputs[0].reshape(-1, 32)
            pre = [F.linear(tokens, e.get_submodule(layer.layer).weight) for e in experts]
            pre = [z + e.get_submodule(layer.layer).bias for z, e in zip(pre, experts, strict=True)]

            def act(z):
                inner = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
                return z / 2 * (1 + torch.tanh(inner))

            pre = [z.double() for z in pre]
            a = act((pre[0] + pre[1]) / 2)
            e = (act(pre[0]) + act(pre[1])) / 2
        torch.testing.assert_close(layer.node, ((a - e) ** 2).mean(0), rtol=1e-5, atol=0)


def test_large_batches_in_float32_agree_with_float64() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 2))
    x = torch.randn(60, 80, 24)
    for size in (0.3, 0.02):  # the second gap is small: float64 takes over
        experts = [moved(net, seed, size) for seed in (1, 2, 3)]
        layer = measured(experts, net, x, "activation", mode="pretrained", base=net)
        with torch.no_grad():
            z = [expert[0](x).double() for expert in experts]
            wanted = node(mean(F.gelu(part) for part in z), F.gelu(mean(z)), (0, 1))
        torch.testing.assert_close(layer.node, wanted, rtol=1e-5, atol=0)


def test_a_model_without_weights_can_be_traced() -> None:
    for name in ("llama", "phi3", "gpt2", "bert", "resnet"):
        model, batch = made(name)
        with torch.device("meta"):
            empty, _ = made(name)
        before = dict(empty.named_parameters())
        assert described(trace(empty, batch).units) == described(trace(model, batch).units)
        assert all(empty.get_parameter(name) is p for name, p in before.items())


def described(units: tuple[Unit, ...]) -> list[tuple]:
    return [(u.name, u.kind, u.parameters, u.nodes, u.heads, u.label) for u in units]


def test_observing_one_block_touches_no_other_weights() -> None:
    model, batch = made("llama")
    experts = [moved(model, seed) for seed in (1, 2, 3)]
    wanted = measure_m_loss(
        experts, trace(model, batch), batches=[batch], kinds=ALL, mode="pretrained", base=model,
        coefficients=SHARES,
    )  # fmt: skip
    units = [u for u in trace(model, batch).units if u.name.startswith("model.layers.1")]
    for expert in experts:
        block = copy.deepcopy(expert.model.layers[1])
        expert.to("meta")
        expert.model.layers[1] = block
    states = {unit.name: {} for unit in units}
    args, kwargs = inputs_of(model, "model.layers.1", batch)
    watched = observing(model, experts, units, batch, coefficients=SHARES, states=states)
    with evaluating([model, *experts]), watched:
        model.model.layers[1](*args, **kwargs)
    expected = {layer.layer: layer for layer in wanted}
    assert len(units) == 5
    for unit in units:
        found = finished(unit, states[unit.name])
        torch.testing.assert_close(found.node, expected[unit.name].node, rtol=1e-5, atol=1e-18)


def test_mistakes_are_named() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    found = trace(net, x)
    with pytest.raises(RecipeError, match="did you mean 'gated'"):
        measure_m_loss([net], found, batches=[x], merged=net, kinds=["gate"])  # pyright: ignore
    with pytest.raises(ModelError, match="needs the merged model"):
        measure_m_loss([net], found, batches=[x], mode="mean", average=net, merged_layers=True)
    with pytest.raises(ModelError, match="runs the average model"):
        measure_m_loss([net], found, batches=[x], mode="mean", merged=net)


class Clip(nn.Module):
    """A block as CLIP's: torch's attention, or one written out in the block itself."""

    def __init__(self, inline: bool) -> None:
        super().__init__()
        self.inline = inline
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU())
        self.out = nn.Linear(16, 8)
        self.attention = nn.Linear(8, 24) if inline else nn.MultiheadAttention(8, 2)

    def forward(self, x):
        h = self.norm(x)
        if self.inline:
            q, k, v = self.attention(h).chunk(3, -1)
            y = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
        else:
            y = x + self.attention(h, h, h, need_weights=False)[0]
        return y + self.out(self.mlp(y))


def test_attentions_without_a_module_or_a_split_of_their_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    inline = trace(nn.Sequential(Clip(True), Clip(True)), x).units
    assert not named(inline, "attention") and named(inline, "block") == ["0", "1"]
    net = nn.Sequential(Clip(False), Clip(False)).eval()
    experts = [moved(net, seed) for seed in (1, 2, 3)]
    layer = measured(experts, net, x, "attention", mode="pretrained", base=net)
    assert layer.layer == "1.attention" and layer.heads is None
    with torch.no_grad():
        h = net[1].norm(net[0](x))
        models = [*experts, average(experts, SHARES)]
        *outputs, merged = [m[1].attention(h, h, h)[0] for m in models]
    wanted = node(mean(outputs), merged, (0, 1))
    torch.testing.assert_close(layer.node, wanted, rtol=1e-3, atol=1e-15)
