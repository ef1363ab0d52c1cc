"""Where tensors of a checkpoint go in a module that keeps experts of a mixture in stacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.models.loader import load_state, placed
from mergewell.models.places import Place, place_of
from mergewell.models.skeleton import Skeleton, without_weights
from mergewell.storage.spec import TensorSpec


class Mixture(nn.Module):
    """Two experts of three hidden units on two inputs, as transformers 5 stacks them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(2, 2, bias=False)
        self.mlp.experts = nn.Module()
        self.mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 2))
        self.mlp.experts.down_proj = nn.Parameter(torch.zeros(2, 2, 3))


def stored(kinds: tuple[str, str, str], block: str) -> dict[str, Tensor]:
    """Return what a file holds; every tensor has a number of its own."""
    state = {f"{block}.gate.weight": torch.full((2, 2), 9.0)}
    for expert in range(2):
        for index, kind in enumerate(kinds):
            shape = (2, 3) if index == 2 else (3, 2)
            value = 10.0 * expert + index
            state[f"{block}.experts.{expert}.{kind}.weight"] = torch.full(shape, value)
    return state


FILES = [
    stored(("gate_proj", "up_proj", "down_proj"), "mlp"),
    stored(("w1", "w3", "w2"), "block_sparse_moe"),
]


@pytest.mark.parametrize("state", FILES)
def test_experts_of_a_mixture_go_into_stacks(state: dict[str, Tensor]) -> None:
    module = Mixture()
    load_state(module, state)
    experts = module.mlp.experts
    assert experts.gate_up_proj[:, :, 0].tolist() == [[0, 0, 0, 1, 1, 1], [10] * 3 + [11] * 3]
    assert experts.down_proj[:, 0, 0].tolist() == [2, 12]
    specs = {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in state.items()}
    skeleton = Skeleton(
        without_weights(Mixture), specs, lambda names: ((name, state[name]) for name in names)
    )
    skeleton.load(["mlp.experts"])
    assert torch.equal(skeleton.module.mlp.experts.gate_up_proj, experts.gate_up_proj)
    assert bool(skeleton.module.mlp.gate.weight.isnan().all())


def test_an_expert_that_is_missing_and_one_too_many_are_named() -> None:
    state = FILES[0]
    with pytest.raises(ModelError, match=r"1 missing \(mlp.experts.gate_up_proj\)"):
        load_state(Mixture(), {k: t for k, t in state.items() if "1.up_proj" not in k})
    more = {**state, "mlp.experts.2.down_proj.weight": torch.zeros(2, 3)}
    with pytest.raises(ModelError, match=r"unexpected \(mlp.experts.2.down_proj.weight\)"):
        load_state(Mixture(), more)
    wrong = {**state, "mlp.experts.1.up_proj.weight": torch.zeros(2, 3)}
    with pytest.raises(ModelError, match=r"experts.1.up_proj.weight has shape \(2, 3\)"):
        load_state(Mixture(), wrong)


def test_a_part_of_a_stack_is_no_tensor_of_the_module() -> None:
    with pytest.raises(ModelError, match=r"is a part of mlp.experts.gate_up_proj"):
        placed(Mixture(), list(FILES[0]))
    targets = Mixture().state_dict()
    assert place_of("mlp.experts.1.w2.weight", targets) == Place("mlp.experts.down_proj", 1)
    assert place_of("mlp.experts.0.w9.weight", targets) == Place("mlp.experts.0.w9.weight")


def test_a_mixtral_of_transformers_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from language_toys import family, loaded, logits

    from mergewell.models.loader import ModuleSource
    from mergewell.storage.checkpoint import open_checkpoint

    base, _ = family("mixtral", tmp_path, experts=0)
    module = ModuleSource.parse(base).build()
    load_state(module, open_checkpoint(base))
    assert torch.equal(logits("mixtral", module), logits("mixtral", loaded("mixtral", base)))
