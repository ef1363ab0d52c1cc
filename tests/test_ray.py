"""Shard jobs on a Ray cluster of several nodes, one of which is killed during the merge."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run
from mergewell.storage.manifest import verify_files

pytestmark = pytest.mark.slow

LAYERS = 12


def large(folder: Path, seed: int) -> Path:
    """Write 12 tensors of 16 MB, which take a merge long enough to be killed in."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"layers.{i}.weight": torch.randn(8192, 1024, generator=generator).bfloat16()
        for i in range(LAYERS)
    }
    save_file(state, folder / "model.safetensors")
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }


@pytest.mark.filterwarnings("ignore")
def test_a_node_killed_during_the_merge_is_made_up_for(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from mergewell.engines.ray import run_on_ray

    recipe = make_recipe(
        {
            "base": str(large(tmp_path / "base", 0)),
            "experts": [{"path": str(large(tmp_path / f"expert{i}", i + 1))} for i in range(2)],
            "method": {"name": "dare", "density": 0.5},
            "shard_bytes": 20_000_000,
        }
    )
    plan = make_plan(recipe)
    assert len(plan.layouts) == LAYERS
    run(plan, tmp_path / "threads")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    killed = threading.Event()
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        staging = tmp_path / ".ray.mergewell"

        def kill() -> None:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline:
                done = len(list(staging.glob("done/*.json")))
                begun = len(list(staging.glob("files/*.safetensors")))
                if 2 <= done < LAYERS - 4 and begun - done == 2:  # one on each node: one is lost
                    cluster.remove_node(nodes[1], allow_graceful=False)
                    killed.set()
                    return
                time.sleep(0.01)

        killer = threading.Thread(target=kill)
        killer.start()
        manifest = run_on_ray(plan, tmp_path / "ray")
        killer.join()
        deadline = time.monotonic() + 60
        while (alive := sum(n["Alive"] for n in ray.nodes())) > 2 and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed.is_set() and alive == 2, "no node was lost, so this shows nothing"
    assert digest(tmp_path / "ray") == digest(tmp_path / "threads")
    assert verify_files(tmp_path / "ray") == [] and manifest.tensors_changed == LAYERS
