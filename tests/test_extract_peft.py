"""Extracted adapters, loaded by PEFT, against the models that they were extracted from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergewell.extract import Size, extract_adapter
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_toys import bert, gpt2, llama, logits, trained  # noqa: E402 - only if both are there

pytestmark = pytest.mark.filterwarnings("ignore")  # of both, about their own future


def test_two_adapters_merged_and_extracted_are_one_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    cls = transformers.LlamaForCausalLM
    config = {"target_modules": ["q_proj", "down_proj"]}
    paths = [
        trained(tmp_path / f"a{rank}", tmp_path / "base", cls, rank, {"r": rank, **config})
        for rank in (2, 5)
    ]
    recipe = make_recipe(
        {
            "base": str(tmp_path / "base"),
            "experts": [{"path": str(path)} for path in paths],
            "method": {"name": "task_arithmetic", "scale": 0.7},
        }
    )
    run(make_plan(recipe), tmp_path / "merged")
    done = extract_adapter(
        tmp_path / "base", tmp_path / "merged", tmp_path / "a", size=Size(rank=16)
    ).model_dump()["extract"]
    assert {cut["rank"] for cut in done["tensors"].values()} == {7}
    merged = logits(cls.from_pretrained(tmp_path / "merged"))
    base = cls.from_pretrained(tmp_path / "base")
    assert float((merged - logits(base)).abs().max()) > 1e-3
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"
    assert float((logits(loaded) - merged).abs().max()) < 1e-6


@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_a_whole_fine_tune_is_an_adapter_of_full_rank(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    cls = type(model)
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "expert")
    tied = "transformer.wte.weight" if make is gpt2 else None
    done = extract_adapter(
        tmp_path / "base",
        tmp_path / "expert",
        tmp_path / "a",
        size=Size(energy=1.0),
        leave_out=[tied] if tied else [],
    ).model_dump()["extract"]
    if tied:
        with torch.no_grad():
            model.transformer.wte.weight.copy_(
                cls.from_pretrained(tmp_path / "base").lm_head.weight
            )
    else:
        assert done["error"] < 1e-6
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "a")
    assert float((logits(loaded) - logits(model)).abs().max()) < 2e-6
