"""The anonymous memory that a check needs whose models are larger than that.

    python benchmarks/check/memory.py --folder /tmp/mergewell-memory [--layers 30] [--tokens 32]

Writes a Llama-shaped base of 1.5 billion parameters (at 30 layers) and three experts near it, in
bfloat16, 3 GB each and random; checks them with 128 sequences; prints the peak of `RssAnon` in
/proc/self/status, sampled 20 times a second; and removes the folder. With `--compare` a check that
reads all weights at once follows, and the largest relative differences between the two are printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergewell.calibration.collect import calibrate
from mergewell.calibration.data import Data, Memory
from mergewell.calibration.result import Calibration
from mergewell.check import check
from mergewell.flags import recipe_from_flags
from mergewell.inputs import batches
from mergewell.models.loader import ModuleSource
from mergewell.plan import make_plan

HIDDEN, INNER, VOCABULARY, HEADS, GROUPS, WIDTH = 2048, 5632, 32_000, 16, 4, 128


def write(folder: Path, layers: int, experts: int) -> tuple[str, list[str]]:
    """Write base and experts, a file a layer; return their folders."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH,
        "tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shapes = {
        "self_attn.q_proj": (HEADS * WIDTH, HIDDEN), "self_attn.k_proj": (GROUPS * WIDTH, HIDDEN),
        "self_attn.v_proj": (GROUPS * WIDTH, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    parts = [
        {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        for layer in range(layers)
    ]
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    parts.append({**ends, "lm_head.weight": (VOCABULARY, HIDDEN)})
    folders = [folder / "base", *(folder / f"expert{i}" for i in range(1, experts + 1))]
    where: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        where |= dict.fromkeys(part, file)
        base: dict[str, torch.Tensor] = {}
        for index, place in enumerate(folders):
            place.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(1000 * index + number)
            state: dict[str, torch.Tensor] = {}
            for name, shape in part.items():
                noise = torch.randn(shape, generator=generator)
                fan = shape[-1] ** -0.5
                if index:
                    state[name] = base[name] + 0.1 * fan * noise
                else:
                    state[name] = base[name] = 1 + 0.1 * noise if len(shape) == 1 else fan * noise
            save_file({n: t.bfloat16() for n, t in state.items()}, place / file, {"format": "pt"})
    for place in folders:
        index_file = {"metadata": {}, "weight_map": where}
        (place / "model.safetensors.index.json").write_text(json.dumps(index_file))
        (place / "config.json").write_text(json.dumps(config))
    return str(folders[0]), [str(place) for place in folders[1:]]


class Peak:
    """Samples this process's anonymous memory while it is open."""

    def __enter__(self) -> Peak:
        self.anonymous, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.anonymous = max(self.anonymous, anonymous())


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def differences(left: Calibration, right: Calibration) -> dict[str, float]:
    """Return the largest relative differences between two calibrations, by what was measured."""
    found = {"output_gap": abs(left.output_gap / right.output_gap - 1)}
    pairs = zip(left.m_loss, right.m_loss, strict=True)
    found["m_loss"] = max(abs(one.relative / other.relative - 1) for one, other in pairs)
    for key, state in left.states.items():
        for name, tensor in state.items():
            other = right.states[key][name]
            scale = float(other.double().abs().max()) or 1.0
            gap = float((tensor.double() - other.double()).abs().max()) / scale
            family = key.partition("/")[0]
            found[f"state {family}"] = max(found.get(f"state {family}", 0.0), gap)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--activations", type=int, default=1 << 30)
    parser.add_argument("--compare", action="store_true")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} exists already")
    try:
        base, experts = write(given.folder, given.layers, 3)
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(0, VOCABULARY, (given.samples, given.tokens), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        plan = make_plan(
            recipe_from_flags(base=base, experts=experts, method="average", settings=[])
        )
        data = Data(
            ModuleSource.parse(base).build, tuple(batches(inputs, given.batch)), given.samples
        )
        result: dict[str, Any] = {
            "parameters": sum(spec.numel for spec in plan.reference.specs.values()),
            "bytes_a_model": plan.reference.content_bytes,
            "samples": given.samples,
            "tokens": given.tokens,
            "anonymous_before": anonymous(),
        }
        began = time.perf_counter()
        shown = 0.0

        def progress(step: str, done: int, total: int) -> None:
            nonlocal shown
            now = time.perf_counter() - began
            if now - shown > 30:
                shown = now
                print(f"{now:5.0f} s  {step} {100 * done / total:3.0f} %", flush=True)

        with Peak() as peak:
            memory = Memory(activations=given.activations)
            outside = calibrate(plan, data, memory=memory, on_step=progress)
        result["calibrate_anonymous_peak"] = peak.anonymous
        result["calibrate_s"] = round(time.perf_counter() - began)
        with Peak() as peak:
            verdict = check(plan, ["a", "b", "c"], calibration=outside, on_step=progress).verdict
        result["check_anonymous_peak"] = peak.anonymous
        result |= {"seconds": round(time.perf_counter() - began), "verdict": verdict}
        if given.compare:
            with Peak() as peak:
                inside = calibrate(plan, data, memory=Memory(weights=1 << 62, activations=1 << 62))
            result |= {
                "in_memory_anonymous_peak": peak.anonymous,
                "differences": differences(outside, inside),
            }
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
