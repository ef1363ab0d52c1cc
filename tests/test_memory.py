"""Memory does not grow with the model: anonymous memory of merges of 7 MB and of 1 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Runs in a process of its own: merges, and samples the anonymous memory above the imports'.
MEASURE = """
import json, sys, threading, time
from pathlib import Path

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024

from mergewell.plan import make_plan
from mergewell.flags import recipe_from_flags
from mergewell.run import run

base, expert, method, out = sys.argv[1:]
plan = make_plan(recipe_from_flags(base=base, experts=[expert], method=method, settings=[]))
before, peak, done = anonymous(), 0, threading.Event()

def sample():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=sample)
thread.start()
run(plan, out, workers=2)
done.set()
thread.join()
print(json.dumps(max(peak, anonymous()) - before))
"""


def write_large(path: Path, megabytes: int, seed: int) -> Path:
    """Write bf16 matrices of 2 MB and one large embedding, without holding them."""
    generator = np.random.default_rng(seed)
    block = generator.standard_normal(1 << 19, dtype=np.float32).view(np.uint32) >> 16
    data = block.astype(np.uint16).tobytes()  # 1 MB
    sizes = {"embed.weight": megabytes // 4}
    sizes |= {f"layers.{i}.weight": 2 for i in range((megabytes - megabytes // 4) // 2)}
    header: dict[str, object] = {}
    offset = 0
    for name, size in sizes.items():
        end = offset + size * len(data)
        shape = [size * 512, 1024]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(offset // len(data)):
            file.write(data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare"])
def test_a_large_merge_takes_no_more_memory_than_a_small_one(tmp_path: Path, method: str) -> None:
    peaks = {}
    for megabytes in (7, 1000):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        base = write_large(folder / "base" / "model.safetensors", megabytes, 0)
        expert = write_large(folder / "expert" / "model.safetensors", megabytes, 1)
        arguments = [str(base), str(expert), method, str(folder / "out")]
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
        )
        peaks[megabytes] = json.loads(ran.stdout) / 1e6
    print(f"\n{method}: anonymous memory above the imports' in MB: {peaks}")
    assert peaks[1000] - peaks[7] < 50
