"""Make the parity tables: what FusionBench itself computes from the toy models.

Run in an environment of its own, which no other code here uses:

    python -m venv /opt/fusion-bench-venv
    /opt/fusion-bench-venv/bin/pip install fusion-bench==0.2.33 torch==2.13.0
    /opt/fusion-bench-venv/bin/python tests/parity/make_fusion_bench.py
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.isotropic_merging.iso import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.magmax import MagMaxAlgorithm
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.singular_value_calibration.svc import SingularValueCalibration
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi.wudi import WUDIMerging
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from fusion_bench_cases import base, experts

OUT = Path(__file__).parent / "fusion_bench"


class Toy(nn.Module):
    """The toy models' architecture."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm = nn.RMSNorm(12)
        self.second = nn.Linear(12, 5, bias=False)


def module(state: Mapping[str, Tensor]) -> nn.Module:
    """Return the module with these weights."""
    toy = Toy()
    toy.load_state_dict(dict(state))
    return toy


def pool(**more: Mapping[str, Tensor]) -> BaseModelPool:
    """Return base and experts as FusionBench takes them."""
    models = {"_pretrained_": base(), **{f"e{k}": e for k, e in enumerate(experts())}, **more}
    return BaseModelPool({name: module(state) for name, state in models.items()})


def run(algorithm: object, **more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what an algorithm merges."""
    return dict(algorithm.run(pool(**more)).state_dict())


def task_vectors() -> list[dict[str, Tensor]]:
    """Return the experts less the base."""
    return [{n: t - base()[n] for n, t in expert.items()} for expert in experts()]


def svc() -> dict[str, Tensor]:
    """Return the calibrated sum of task vectors; their vectors stay as merged."""
    merged = run(TaskArithmeticAlgorithm(scaling_factor=0.4))
    return run(SingularValueCalibration(alpha=0.2), _merged_=merged)


def knots() -> dict[str, Tensor]:
    """Return a matrix merged by TIES in the common basis."""
    name = "first.weight"
    left, values, right = subspace_alignment([tau[name] for tau in task_vectors()])
    flat = torch.stack([(values[:, None] * part).flatten() for part in right])
    merged = ties_merging(flat, reset_thresh=0.4, merge_func="mean")
    return {name: base()[name] + left @ merged.view(len(values), -1)}


def emr() -> dict[str, Tensor]:
    """Return the base plus the unified task vector."""
    unified = emr_merge(task_vectors())[0]
    return {name: base()[name] + unified[name] for name in base()}


def consensus() -> dict[str, Tensor]:
    """Return the base plus the sum where two masks or more agree."""
    found: dict[str, Tensor] = {}
    for name, own in base().items():
        taus = torch.stack([tau[name].flatten() for tau in task_vectors()])
        flat = own.flatten()
        masks = generate_task_masks(taus, flat + taus, flat, tall_mask_lambda=0.4)
        found[name] = own + (taus.sum(0) * (masks.sum(0) >= 2)).view_as(own)
    return found


MAKERS: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "task_arithmetic": lambda: run(TaskArithmeticAlgorithm(scaling_factor=0.4)),
    "ties": lambda: run(
        TiesMergingAlgorithm(scaling_factor=1.0, threshold=0.3, remove_keys=[], merge_func="mean")
    ),
    "magmax": lambda: run(MagMaxAlgorithm(scaling_factor=0.5)),
    "model_stock": lambda: run(ModelStock()),
    "tsv": lambda: run(TaskSingularVectorMerging()),
    "iso_c": lambda: run(ISO_C_Merge(scaling_factor=1.5)),
    "iso_cts": lambda: run(ISO_CTS_Merge(scaling_factor=1.5, common_space_fraction=0.5)),
    "wudi": lambda: run(WUDIMerging(iter_num=40)),
    "svc": svc,
    "knots": knots,
    "emr": emr,
    "consensus": consensus,
}


def main() -> None:
    """Write one table a case."""
    OUT.mkdir(exist_ok=True)
    for name, make in MAKERS.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = {key: t.detach().float().contiguous() for key, t in make().items()}
        origin = {"fusion-bench": version("fusion-bench"), "torch": torch.__version__}
        save_file(found, OUT / f"{name}.safetensors", origin)
        print(name, list(found))


if __name__ == "__main__":
    main()
