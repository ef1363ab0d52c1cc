"""Modules without weights, and how they get them."""

import pytest
import torch
from architectures import ARCHITECTURES, bert, cnn, llama, randomised, skeleton, tokens
from torch import nn

from mergewell.errors import ModelError
from mergewell.models.skeleton import Fetching
from mergewell.models.trace import trace


def test_nothing_is_there_until_it_is_loaded_and_after_it_is_dropped() -> None:
    real = llama()
    state = randomised(real, 1, 0.1)
    assert "lm_head.weight" not in state
    real.load_state_dict(state, strict=False)
    bones, x = skeleton(llama, state), tokens(2)["input_ids"]
    assert sum(p.untyped_storage().nbytes() for p in bones.module.parameters()) < 200
    assert torch.equal(bones.module.model.rotary_emb.inv_freq, real.model.rotary_emb.inv_freq)
    weight = bones.module.model.norm.weight
    bones.load([""])
    with torch.no_grad():
        assert torch.equal(bones.module(x).logits, real(x).logits)
        bones.drop(["model.norm"])
        assert bones.module.model.norm.weight is weight
        assert bones.module(x).logits.isnan().all()  # an absent weight cannot pass unseen
        bones.load(["model.norm"])
        assert torch.equal(bones.module(x).logits, real(x).logits)
    assert bones.module.lm_head.weight is bones.module.model.embed_tokens.weight
    assert not bones.module.config.use_cache


def test_only_what_is_asked_for_is_read() -> None:
    state, read = randomised(bert(), 1, 0.1), []
    bones = skeleton(bert, state)
    bones._read = lambda names: read.extend(names) or ((n, state[n]) for n in names)
    bones.load(["encoder.layer.1"])
    assert read and all(name.startswith("encoder.layer.1.") for name in read)
    before = len(read)
    bones.load(["encoder.layer.1"])
    assert len(read) == before


def test_stored_dtypes_are_cast_and_names_are_checked() -> None:
    state = {
        n: t.bfloat16() if t.is_floating_point() else t
        for n, t in randomised(cnn(), 1, 0.1).items()
    }
    bones = skeleton(cnn, state)
    bones.load([""])
    assert bones.module.stem.weight.dtype == torch.float32
    assert torch.equal(bones.module.stem.weight, state["stem.weight"].float())
    assert torch.equal(bones.module.norm.running_var, state["norm.running_var"].float())
    state["head.weight"] = torch.zeros(3, 8)
    with pytest.raises(ModelError, match=r"head\.weight has shape"):
        skeleton(cnn, state)
    del state["head.weight"]
    with pytest.raises(ModelError, match="1 missing"):
        skeleton(cnn, state)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trace_needs_no_weights(name: str) -> None:
    factory, inputs = ARCHITECTURES[name]
    real, batch = factory(), inputs(2)
    if hasattr(real, "config"):
        real.config.use_cache = False
    bones = skeleton(factory, randomised(real, 1, 0.1))
    with bones.filled() as module:
        found = trace(module, batch)
    assert found == trace(real, batch)
    with pytest.raises(StopIteration):
        next(p for p in bones.module.parameters() if not p.isnan().all())


def test_a_factory_that_looks_at_values_works_too() -> None:
    def fussy() -> nn.Module:
        net = nn.Linear(2, 2)
        if float(net.weight.abs().max()) >= 0:
            net.scale = 2
        return net

    bones = skeleton(fussy, {"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    assert bones.module.scale == 2 and bones.module.weight.isnan().all()
    bones.load([""])
    assert torch.equal(bones.module(torch.ones(2)), torch.full((2,), 2.0))


def test_weights_lie_as_the_factory_laid_them() -> None:
    def channels_last() -> nn.Module:
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    weight = torch.randn(4, 3, 3, 3)
    bones = skeleton(channels_last, {"weight": weight, "bias": torch.zeros(4)})
    with bones.filled() as module:
        assert module.weight.stride() == (27, 1, 9, 3)
    bones.load([""])
    assert bones.module.weight.stride() == (27, 1, 9, 3) and torch.equal(
        bones.module.weight, weight
    )


def test_used_weights_are_fetched_and_stay() -> None:
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    bones = skeleton(lambda: nn.Linear(2, 2), state)
    with Fetching(bones, bones.keep), torch.no_grad():
        assert bones.module.weight.T.sum() == 4
    bones.drop([""])
    assert bones.module.weight.sum() == 4 and bones.module.bias.isnan().all()
    bones.release()
    assert bones.module.weight.isnan().all()
