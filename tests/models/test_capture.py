"""M-Loss of whole networks: exact zeros, modes, and brute force on real layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.models.capture import LayerMLoss, measure_m_loss, pooled
from mergewell.models.trace import trace

MODES = ("merged", "pretrained", "own")


def small_net(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 4, 1),
        activation(),
        nn.Flatten(),
        nn.Linear(64, 8),
        activation(),
        nn.Linear(8, 2),
    )
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


def perturbed(model: nn.Module, seed: int, size: float = 0.03) -> nn.Module:
    """A copy whose parameters move by `size` times their own spread."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if "embeddings" in name:  # large, and no layer that is looked at
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += size * noise * parameter.abs().mean()
    return moved.eval()


def averaged(models: list[nn.Module]) -> nn.Module:
    mean = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    mixed = {
        name: torch.stack([state[name] for state in states]).mean(0)
        for name, tensor in states[0].items()
        if tensor.is_floating_point()
    }
    mean.load_state_dict(mixed, strict=False)
    return mean.eval()


def is_zero(layer: LayerMLoss) -> bool:
    return layer.absolute == 0 and layer.relative == 0 and bool((layer.node == 0).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("experts", [2, 3, 4])
def test_equal_experts_give_exactly_zero(mode, activation, experts: int) -> None:
    net, x = small_net(activation), torch.randn(5, 3, 6, 6)
    copies = [copy.deepcopy(net) for _ in range(experts)]
    found = measure_m_loss(copies, trace(net, x), batches=[x], mode=mode, merged=net, base=net)
    assert [layer.layer for layer in found] == ["0", "3", "6"]
    assert all(map(is_zero, found))
    other = measure_m_loss(
        [*copies, perturbed(net, 1, 0.5)],
        trace(net, x),
        batches=[x],
        mode=mode,
        merged=net,
        base=net,
    )
    assert not any(map(is_zero, other))


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_equal_experts_give_exactly_zero_on_efficientnet(efficientnet, experts: int) -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found_layers = trace(efficientnet, x[:1])
    copies = [efficientnet, *[copy.deepcopy(efficientnet) for _ in range(experts - 1)]]
    for mode in MODES:
        found = measure_m_loss(
            copies, found_layers, batches=[x], mode=mode, merged=efficientnet, base=efficientnet
        )
        assert len(found) == 33 and all(map(is_zero, found))


def brute_force(z: torch.Tensor, activation, shares) -> torch.Tensor:
    """Node M-Loss straight from the definition, [observations, O] in z[j], in float64."""
    nodes = []
    for i in range(z.shape[-1]):
        column = z[..., i].double()
        ensemble = sum(c * activation(column[j]) for j, c in enumerate(shares))
        merged = activation(sum(c * column[j] for j, c in enumerate(shares)))
        nodes.append(((ensemble - merged) ** 2).mean())
    return torch.stack(nodes)


def test_brute_force_on_a_real_efficientnet_layer(efficientnet) -> None:
    experts = [perturbed(efficientnet, seed).double() for seed in (1, 2, 3)]
    merged, shares = averaged(experts), [0.5, 0.3, 0.2]
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    found = measure_m_loss(
        experts, trace(merged, x[:1]), batches=[x[:2], x[2:]], merged=merged, coefficients=shares
    )
    with torch.no_grad():
        block, h = merged._blocks[3], x  # the brute force follows the network by hand
        h = merged._swish(merged._bn0(merged._conv_stem(h)))
        for before in merged._blocks[:3]:
            h = before(h)
        h = block._swish(block._bn0(block._expand_conv(h)))
        own = [expert._blocks[3] for expert in experts]
        z = torch.stack(
            [b._bn1(b._depthwise_conv(h)).permute(0, 2, 3, 1).flatten(0, 2) for b in own]
        )
    (layer,) = (each for each in found if each.layer == "_blocks.3._depthwise_conv")
    torch.testing.assert_close(layer.node, brute_force(z, F.relu6, shares), rtol=1e-6, atol=0)
    assert layer.activation == "relu6" and layer.nodes == 144 and 1e-4 < layer.relative < 0.5


def test_brute_force_on_a_real_minilm_layer_with_padding(minilm_folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModel.from_pretrained(minilm_folder, add_pooling_layer=False).eval()
    experts = [perturbed(base, seed) for seed in (1, 2)]
    tokens = torch.randint(1000, 20000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    (layer,) = (
        each
        for each in measure_m_loss(
            experts, trace(base, batch), batches=[batch], mode="pretrained", base=base
        )
        if each.layer == "encoder.layer.2.intermediate.dense"
    )
    with torch.no_grad():
        h = base(**batch, output_hidden_states=True).hidden_states[2]
        allowed = mask[:, None, None].bool()
        attended = base.encoder.layer[2].attention(h, allowed.expand(3, 1, 9, 9))[0]
        own = [expert.encoder.layer[2].intermediate.dense for expert in experts]
        z = torch.stack([dense(attended)[mask.bool()] for dense in own])
    wanted = brute_force(z[..., ::8], F.gelu, [0.5, 0.5])
    torch.testing.assert_close(layer.node[::8], wanted, rtol=1e-6, atol=0)


def test_own_mode_follows_every_model_on_its_path() -> None:
    net, x = small_net(nn.GELU), torch.randn(5, 3, 6, 6)
    experts = [perturbed(net, seed, 0.3) for seed in (1, 2)]
    merged = averaged(experts)
    found = measure_m_loss(experts, trace(net, x), batches=[x], mode="own", merged=merged)
    with torch.no_grad():
        one, two, mean = (model[:8](x).double() for model in (*experts, merged))
    torch.testing.assert_close(
        found[2].node, ((one + two) / 2 - mean).square().mean(0), rtol=1e-4, atol=0
    )


def test_in_place_activations_do_not_spoil_what_is_seen() -> None:
    def inplace() -> nn.Module:
        return nn.SiLU(inplace=True)

    x = torch.randn(5, 3, 6, 6)
    plain, written = small_net(nn.SiLU), small_net(inplace)
    for mode in MODES:
        found = [
            measure_m_loss(
                [perturbed(net, seed) for seed in (1, 2)],
                trace(net, x),
                batches=[x],
                mode=mode,
                merged=net,
                base=net,
            )
            for net in (plain, written)
        ]
        for left, right in zip(*found, strict=True):
            assert torch.equal(left.node, right.node)


def test_batches_are_joined_and_progress_is_told() -> None:
    net, x = small_net(nn.ReLU), torch.randn(6, 3, 6, 6)
    experts = [perturbed(net, seed) for seed in (1, 2)]
    told: list[int] = []
    parts = measure_m_loss(
        experts, trace(net, x), batches=[x[:2], x[2:3], x[3:]], merged=net, on_batch=told.append
    )
    whole = measure_m_loss(experts, trace(net, x), batches=[x], merged=net)
    assert told == [1, 2, 3]
    for left, right in zip(parts, whole, strict=True):
        torch.testing.assert_close(left.node, right.node, rtol=1e-4, atol=0)
        assert left.absolute == pytest.approx(right.absolute, rel=1e-5)


def test_units_are_pooled_by_their_sums() -> None:
    net, x = small_net(nn.GELU), torch.randn(5, 3, 6, 6)
    experts = [perturbed(net, seed, 0.3) for seed in (1, 2)]
    found = measure_m_loss(experts, trace(net, x), batches=[x], mode="pretrained", base=net)
    assert pooled(found[1:2]) == pytest.approx(found[1].relative, rel=1e-12)
    gaps = [layer.node.sum() * layer.observations for layer in found]
    energies = [layer.energy.sum() * layer.observations for layer in found]
    assert pooled(found) == pytest.approx(float(sum(gaps) / sum(energies)) ** 0.5)
    assert [layer.observations for layer in found] == [80, 80, 5]
    assert pooled([]) == 0


def test_modes_take_h_from_the_model_they_name() -> None:
    net, x = small_net(nn.ReLU), torch.randn(5, 3, 6, 6)
    experts = [perturbed(net, seed) for seed in (1, 2)]
    far = perturbed(net, 3, 1.0)
    found = trace(net, x)
    near = measure_m_loss(experts, found, batches=[x], mode="pretrained", base=net, merged=far)
    other = measure_m_loss(experts, found, batches=[x], mode="merged", base=net, merged=far)
    assert torch.equal(near[0].node, other[0].node)  # the input itself is the same
    assert not torch.allclose(near[2].node, other[2].node, rtol=1e-2)


def test_modules_come_back_as_they_were_even_after_an_error() -> None:
    net, x = small_net(nn.ReLU), torch.randn(5, 3, 6, 6)
    net.train()
    before = copy.deepcopy(net.state_dict())
    found = trace(net, x)
    measure_m_loss([net, net], found, batches=[x], merged=net)
    with pytest.raises(DataError):
        measure_m_loss([net, net], found, batches=[torch.randn(5, 4, 6, 6)], merged=net)
    assert not any(part._forward_hooks for part in net.modules())
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_mistakes_are_named() -> None:
    net, x = small_net(nn.ReLU), torch.randn(5, 3, 6, 6)
    found = trace(net, x)
    with pytest.raises(RecipeError, match="did you mean 'own'"):
        measure_m_loss([net], found, batches=[x], mode="owned", merged=net)  # pyright: ignore
    with pytest.raises(RecipeError, match="no experts"):
        measure_m_loss([], found, batches=[x], merged=net)
    with pytest.raises(RecipeError, match="sum to 1"):
        measure_m_loss([net, net], found, batches=[x], merged=net, coefficients=[1.0, 1.0])
    with pytest.raises(ModelError, match="runs the base"):
        measure_m_loss([net], found, batches=[x], mode="pretrained", merged=net)
    with pytest.raises(ModelError, match=r"Expert 2 has no layer '6'"):
        measure_m_loss([net, net[:5]], found, batches=[x], merged=net)
    with pytest.raises(DataError, match="no batches"):
        measure_m_loss([net], found, batches=[], merged=net)
    broken = copy.deepcopy(net)
    broken[3].weight.data[0] = float("nan")
    with pytest.raises(DataError, match=r"Layer 3: .*not finite"):
        measure_m_loss([net, broken], found, batches=[x], merged=net)


class TokenNet(nn.Module):
    """A layer, its activation and another layer on every token, padding or not."""

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = kind(6, 10), kind(10, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class OddLinear(nn.Linear):
    """Not torch's own forward, so that it may do anything with what surrounds a token."""

    rows: int = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        OddLinear.rows += x[..., 0].numel()
        return super().forward(x)


@pytest.mark.parametrize("merged_layers", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_layers_are_run_on_padding_only_where_they_may_look_at_it(
    mode, merged_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergewell.models.observe._ELEMENTS", 2 * 7 * 10)  # 2 samples at a time
    mask = torch.arange(7) < torch.tensor([7, 2, 0, 1, 3, 4, 7, 1, 1])[:, None]
    batch = {"x": torch.randn(9, 7, 6).double(), "attention_mask": mask.long()}
    batch["x"][~mask] = 1e6  # would show
    found = []
    for kind in (nn.Linear, OddLinear):
        base = TokenNet(kind).double().eval()
        experts = [perturbed(base, seed, 0.5) for seed in (1, 2, 3)]
        units = trace(base, batch)
        OddLinear.rows = 0
        found.append(
            measure_m_loss(
                experts, units, batches=[batch, batch], mode=mode, merged=averaged(experts),
                base=base, merged_layers=merged_layers,
            )[0]
        )  # fmt: skip
    packed, whole = found
    assert OddLinear.rows >= 2 * 4 * mask.numel()
    assert packed.observations == whole.observations == 2 * int(mask.sum())
    assert packed.relative == pytest.approx(whole.relative, rel=1e-12) and packed.relative > 0
    assert packed.absolute == pytest.approx(whole.absolute, rel=1e-12)
    torch.testing.assert_close(packed.node, whole.node, rtol=1e-9, atol=0)
    if whole.theory is not None:
        assert packed.theory is not None
        torch.testing.assert_close(packed.theory.bound, whole.theory.bound, rtol=1e-9, atol=0)
    else:
        assert merged_layers or mode == "own"


def test_no_expert_is_given_padding() -> None:
    mask = torch.arange(7) < torch.tensor([7, 2, 5])[:, None]
    batch = {"x": torch.randn(3, 7, 6), "attention_mask": mask.long()}
    base = TokenNet(nn.Linear).eval()
    experts = [perturbed(base, seed, 0.5) for seed in (1, 2)]
    merged, seen = averaged(experts), list[int]()
    for expert in experts:
        expert.up.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel()))
    measure_m_loss(experts, trace(base, batch), batches=[batch], merged=merged)
    assert seen == [int(mask.sum())] * 2
