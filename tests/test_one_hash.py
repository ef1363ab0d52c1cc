"""One sha256 whatever carries a merge out: threads, blocks, shard jobs, a Ray cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergewell.jobs import run_shard
from mergewell.plan import BLOCK, Plan, make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run

METHODS: list[dict[str, Any]] = [
    {"name": "average"},
    {"name": "task_arithmetic", "scale": 0.4},
    {"name": "ties", "density": 0.2},
    {"name": "ties", "density": 0.2, "trim_scope": "model"},
    {"name": "dare", "density": 0.5},
    {"name": "dare", "density": 0.5, "rescale": "norm"},
    {"name": "della", "density": 0.5, "epsilon": 0.15},
    {"name": "breadcrumbs", "density": 0.2},
    {"name": "sce", "density": 0.2},
    {"name": "model_stock"},
]


def plan_of(folder: Path, method: dict[str, Any]) -> Plan:
    paths: list[str] = []
    for model in range(4):
        generator = torch.Generator().manual_seed(model)
        where = folder / f"model{model}"
        paths.append(str(where))
        if where.exists():
            continue
        where.mkdir()
        base = torch.Generator().manual_seed(99)
        state = {
            name: torch.randn(shape, generator=base)
            + 0.01 * model * torch.randn(shape, generator=generator)
            for name, shape in {
                "embed": (1700, 513), "a": (901, 300), "b": (70_001,), "norm": (513,), "c": (64, 3),
            }.items()
        }  # fmt: skip
        save_file({name: t.bfloat16() for name, t in state.items()}, where / "model.safetensors")
    experts = [{"path": path, "coefficient": 0.5} for path in paths[1:]]
    data = {"base": paths[0], "experts": experts, "method": method, "shard_bytes": 600_000}
    return make_plan(make_recipe(data))


def digest(folder: Path) -> str:
    content = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        content.update(file.name.encode() + file.read_bytes())
    return content.hexdigest()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_threads_blocks_and_shard_jobs_give_one_sha256(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    plan = plan_of(tmp_path, method)
    assert len(plan.layouts) > 2
    found: dict[str, str] = {}
    for workers in (1, 2, 4, 8):
        run(plan, tmp_path / f"w{workers}", workers=workers)
        found[f"{workers} threads"] = digest(tmp_path / f"w{workers}")
    for block in (BLOCK // 2, 2 * BLOCK, 8 * BLOCK):
        run(plan, tmp_path / f"b{block}", workers=2, block=block)
        found[f"blocks of {block}"] = digest(tmp_path / f"b{block}")
    for index in (2, 0, 1):
        run_shard(plan, tmp_path / "shards", index, 3, workers=2)
    found["3 shard jobs"] = digest(tmp_path / "shards")
    run_shard(plan, tmp_path / "shard", 0, 1)
    found["1 shard job"] = digest(tmp_path / "shard")
    assert len(set(found.values())) == 1, found


@contextmanager
def ray_cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_gives_the_same_sha256(tmp_path: Path) -> None:
    from mergewell.engines.ray import run_on_ray

    with ray_cluster():
        for number, method in enumerate(METHODS):
            plan = plan_of(tmp_path, method)
            run(plan, tmp_path / f"threads{number}")
            run_on_ray(plan, tmp_path / f"ray{number}")
            assert digest(tmp_path / f"ray{number}") == digest(tmp_path / f"threads{number}")
