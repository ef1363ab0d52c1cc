"""Where networks are cut."""

import pytest
from architectures import ARCHITECTURES, Residual, cnn, llama
from torch import nn

from mergewell.models.cut import Piece, cut


def test_a_convolutional_net_keeps_its_stem_together() -> None:
    assert cut(cnn()) == (
        Piece(("stem", "norm"), False),
        Piece(("blocks.0",), True),
        Piece(("blocks.1",), True),
        Piece(("blocks.2",), True),
        Piece(("head",), False),
    )


def test_a_llama_with_tied_embeddings() -> None:
    names = [piece.modules for piece in cut(llama())]
    assert names == [
        ("model.embed_tokens",),
        *((f"model.layers.{i}",) for i in range(3)),
        ("model.norm", "lm_head"),
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_a_piece(name: str) -> None:
    module = ARCHITECTURES[name][0]()
    pieces = [module_name for piece in cut(module) for module_name in piece.modules]
    held = {id(parameter) for one in pieces for parameter in module.get_submodule(one).parameters()}
    assert held == {id(parameter) for parameter in module.parameters()}


def test_plain_layers_are_no_blocks() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert cut(net) == (Piece(("",), False),)


def test_a_block_with_most_of_the_weights_is_looked_into() -> None:
    small, large = Residual(2), nn.Sequential(Residual(8), Residual(8), Residual(8))
    net = nn.Sequential(nn.Sequential(small, Residual(2)), large)
    blocks = [piece.modules[0] for piece in cut(net) if piece.is_block]
    assert blocks == ["0", "1.0", "1.1", "1.2"]
