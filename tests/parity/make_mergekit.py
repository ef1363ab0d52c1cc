"""Make the parity tables: what mergekit itself computes from the toy models.

Run in an environment of its own, which no other code here uses:

    python -m venv /opt/mergekit-venv
    /opt/mergekit-venv/bin/pip install mergekit==0.1.4 torch==2.13.0
    /opt/mergekit-venv/bin/python tests/parity/make_mergekit.py [NAME ...]

with "transformers<5". ram and ramplus_tl came with mergekit 0.1.5 (and its own transformers): their
tables are made in a second such environment.
"""

from __future__ import annotations

import base64
import json
import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from mergekit_cases import DETERMINISTIC, RANDOM, STRIDE, moments, write_models

OUT = Path(__file__).parent / "mergekit"
SEEDS = 60


def merged(data: dict, folder: Path, *, seed: int = 0) -> tuple[dict, dict]:
    """Return the tensors and the configuration that mergekit writes."""
    text = json.dumps(data)
    for name in ("BASE", "A", "B", "C"):
        text = text.replace(f'"{name}"', json.dumps(str(folder / name)))
    LoaderCache().loaders.clear()
    with tempfile.TemporaryDirectory() as out:
        options = MergeOptions(
            random_seed=seed, copy_tokenizer=False, write_model_card=False, quiet=True
        )
        run_merge(MergeConfiguration.model_validate(json.loads(text)), out, options)
        tensors: dict = {}
        for file in sorted(Path(out).glob("*.safetensors")):
            tensors |= load_file(file)
        return tensors, json.loads((Path(out) / "config.json").read_text())


def packed(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    """Return every STRIDE-th element, little-endian in `dtype`, as base64.

    arcee_fusion writes float32 whatever is asked for, so it is rounded here.
    """
    flat = tensor.to(dtype).flatten()[::STRIDE].contiguous()
    return base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()


def main(names: list[str]) -> None:
    """Write a table a case."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            kind: write_models(Path(temporary) / kind, dtype=getattr(torch, kind))
            for kind in ("float32", "bfloat16")
        }
        made = {"mergekit": version("mergekit"), "torch": torch.__version__, "stride": STRIDE}
        for name, data in DETERMINISTIC.items():
            if names and name not in names:
                continue
            table = {**made, "config": data}
            try:
                for kind, folder in folders.items():
                    tensors, config = merged({**data, "dtype": kind}, folder)
                    table["layers"] = config["num_hidden_layers"]
                    table[kind] = {
                        key: packed(tensors[key], getattr(torch, kind)) for key in sorted(tensors)
                    }
            except RuntimeError as error:
                print(name, "was not made:", error)
                continue
            (OUT / f"{name}.json").write_text(json.dumps(table, indent=0) + "\n")
        for name, data in RANDOM.items():
            if names and name not in names:
                continue
            runs = [
                moments(merged({**data, "dtype": "float32"}, folders["float32"], seed=seed)[0])
                for seed in range(SEEDS)
            ]
            table = {**made, "config": data, "seeds": SEEDS} | {
                key: [float(np.mean(values)), float(np.std(values, ddof=1))]
                for key in runs[0]
                for values in [[run[key] for run in runs]]
            }
            (OUT / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
