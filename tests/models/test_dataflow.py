"""Calling a module: what it cannot be run on is said in one sentence."""

import pytest
import torch
from torch import nn

from mergewell.errors import DataError
from mergewell.models.dataflow import call, check_names


def test_names_are_held_against_the_forward_pass() -> None:
    class Net(nn.Module):
        def forward(self, tokens, mask=None):
            return tokens

    class Open(nn.Module):
        def forward(self, tokens, **kwargs):
            return tokens

    x = torch.zeros(1)
    check_names({"tokens": x, "mask": x}, Net())
    check_names({"tokens": x, "other": x}, Open())
    check_names(x, Net())
    with pytest.raises(DataError, match=r"'token' .* did you mean 'tokens'"):
        check_names({"token": x}, Net())
    with pytest.raises(DataError, match=r"needs an input 'tokens' .* \(they hold mask\)"):
        check_names({"mask": x}, Net())


def test_a_module_of_transformers_says_which_input_it_cannot_do_without() -> None:
    class Model(nn.Module):
        main_input_name = "input_ids"

        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            if input_ids is None and inputs_embeds is None:
                raise ValueError("specify one of them")
            return input_ids

    x = torch.zeros(1)
    assert call(Model(), {"input_ids": x}) is x
    assert call(Model(), {"inputs_embeds": x}) is None
    with pytest.raises(DataError, match=r"Model needs an input 'input_ids' .*hold tokens"):
        call(Model(), {"tokens": x})


def test_what_a_module_cannot_be_run_on_is_told_with_its_own_reason() -> None:
    with pytest.raises(
        DataError,
        match=r"Linear cannot be run on one input \[2, 3\] float32 \(RuntimeError: mat1 and mat2",
    ) as caught:
        call(nn.Linear(4, 4), torch.zeros(2, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)
