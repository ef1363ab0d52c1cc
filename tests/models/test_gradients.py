"""Gradients' inner products: against autograd by hand, over batches, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError, ModelError
from mergewell.models.gradients import Lesson, gradient_products, own_answers


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


def lesson(expert: str, seed: int) -> Lesson:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 4, generator=generator) for n in (6, 2)]
    labels = [torch.randint(0, 3, (n,), generator=generator) for n in (6, 2)]
    return Lesson(expert, batches, labels)


def plain_gradient(module: nn.Module, taught: Lesson) -> list[Tensor]:
    logits = torch.cat([module(batch) for batch in taught.batches])
    loss = functional.cross_entropy(logits, torch.cat(list(taught.labels)))
    return list(torch.autograd.grad(loss, list(module.parameters())))


def test_products_are_those_of_the_mean_losses_gradients() -> None:
    module, lessons = network().eval(), [lesson("a", 1), lesson("b", 2)]
    found = gradient_products(module, lessons, at="base")
    one, two = (plain_gradient(module, taught) for taught in lessons)
    for (name, _), a, b in zip(module.named_parameters(), one, two, strict=True):
        expected = [[(a * a).sum(), (a * b).sum()], [(a * b).sum(), (b * b).sum()]]
        assert torch.allclose(found.products[name].float(), torch.tensor(expected), rtol=1e-4)
    assert (found.experts, found.samples, found.at) == (("a", "b"), (8, 8), "base")
    assert found.answers == "labels"


def test_the_module_comes_back_as_it_was() -> None:
    module = network().train()
    module[0].requires_grad_(False)  # pyright: ignore
    before = {name: p.clone() for name, p in module.state_dict().items()}
    gradient_products(module, [lesson("a", 1)], at="base")
    assert module.training and all(part.training for part in module.modules())
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], p) for name, p in module.state_dict().items())


def test_dropout_is_off_and_parameters_can_be_chosen() -> None:
    module, lessons = network(), [lesson("a", 1), lesson("a", 1)]
    found = gradient_products(module, lessons, at="base", wanted=lambda n: n.startswith("3."))
    assert list(found.products) == ["3.weight", "3.bias"]
    assert all(bool((p == p[0, 0]).all()) for p in found.products.values())


def test_an_expert_teaches_its_own_answers() -> None:
    expert, module = network(3), network()
    batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))]
    taught = own_answers(expert, "c", batches, head=lambda logits: -logits)
    assert torch.equal(taught.labels[0], expert.eval()(batches[0]).argmin(-1))
    found = gradient_products(module, [taught, lesson("a", 1)], at="merged")
    assert found.answers == "pseudo-labels" and found.at == "merged"


def test_parameters_that_take_no_part_have_no_gradient() -> None:
    module = network()
    module.register_parameter("idle", nn.Parameter(torch.ones(2)))
    found = gradient_products(module, [lesson("a", 1)], at="base")
    assert found.products["idle"].tolist() == [[0.0]]


def test_mistakes_are_named() -> None:
    with pytest.raises(ModelError, match="no parameter that is wanted"):
        gradient_products(network(), [lesson("a", 1)], at="base", wanted=lambda _: False)
    whole = lesson("a", 1)
    ignored = [torch.full_like(labels, -100) for labels in whole.labels]
    with pytest.raises(DataError, match="a: 2 batches have 2 batches of labels with 0"):
        gradient_products(network(), [Lesson("a", whole.batches, ignored)], at="base")
    with pytest.raises(DataError, match="2 batches have 1"):
        gradient_products(network(), [Lesson("a", whole.batches, whole.labels[:1])], at="base")
