"""SmolLM2-135M for real: checked, merged, loaded by transformers, and still knowing Paris.

The base is made once by `benchmarks/quality/on_language.py`; without it there is nothing to test.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from mergewell.calibration.data import Data  # noqa: E402
from mergewell.check import check  # noqa: E402
from mergewell.inputs import batches, load_inputs  # noqa: E402
from mergewell.models.loader import ModuleSource  # noqa: E402
from mergewell.plan import make_plan  # noqa: E402
from mergewell.recipe import make_recipe  # noqa: E402
from mergewell.run import run  # noqa: E402
from mergewell.storage.checkpoint import open_checkpoint  # noqa: E402
from mergewell.storage.views import write_task_vector  # noqa: E402

BASE = Path.home() / ".cache" / "mergewell" / "quality" / "language" / "base"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BASE / "tokenizer.json").exists(), reason="no SmolLM2 in the cache"),
]


def moved(folder: Path, seed: int) -> Path:
    """Write an expert whose matrices are off by 1 % of their size, as fine-tunes are."""
    generator = torch.Generator().manual_seed(seed)
    with open_checkpoint(BASE) as base:
        state = {
            name: base[name]
            + 0.01 * base[name].std() * torch.randn(spec.shape, generator=generator)
            for name, spec in base.specs.items()
            if "layers" in name and len(spec.shape) == 2
        }
        path = folder / f"expert{seed}.safetensors"
        write_task_vector(path, base, state, {"seed": str(seed)})
    return path


def test_smollm2_is_checked_merged_and_made_to_write(tmp_path: Path) -> None:
    experts = [moved(tmp_path, seed) for seed in (1, 2)]
    texts = tmp_path / "texts.jsonl"
    lines = ["Who wrote Faust?", "The film was a delight.", "Book a table for two.", "Rain today."]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    recipe = make_recipe(
        {
            "base": str(BASE),
            "experts": [{"path": str(path)} for path in experts],
            "method": {"name": "ties", "density": 0.5},
            "dtype": "bfloat16",
        }
    )
    plan = make_plan(recipe)
    inputs = [*batches(load_inputs(texts, model_folder=BASE, tokens=16), 2)]
    found = check(plan, ["a", "b"], data=Data(ModuleSource.parse(BASE).build, inputs, 4))
    assert len(found.layers) == 30
    assert found.level == "good"
    run(plan, tmp_path / "out")
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    given = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])
