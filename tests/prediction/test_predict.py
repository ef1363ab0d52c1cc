"""Prediction of a plan: from weights, from inputs, and what both say of planted sets."""

import json
from pathlib import Path

import pytest
import torch
from language_toys import MODELS
from safetensors.torch import save_file
from torch import nn

from mergewell.calibration.data import Data
from mergewell.check import check
from mergewell.plan import make_plan
from mergewell.prediction.predict import own_tasks, predict_by_inputs, predict_by_weights
from mergewell.recipe import make_recipe
from mergewell.report.prediction import outlook, prediction_of, scatter, span

NAMES = ("one", "two", "three")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = net().state_dict()
    save_file(base, tmp_path / "base.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in NAMES:
        moved = {
            k: v + 0.05 * v.norm() / v.numel() ** 0.5 * torch.randn(v.shape, generator=generator)
            for k, v in base.items()
        }
        save_file(moved, tmp_path / f"{name}.safetensors")
    return tmp_path


def planned(folder: Path, names: tuple[str, ...] = NAMES) -> object:
    experts = [{"path": str(folder / f"{name}.safetensors")} for name in names]
    data = {"base": str(folder / "base.safetensors"), "experts": experts}
    return make_plan(make_recipe({**data, "method": {"name": "average"}}))


def inputs(count: int = 3) -> Data:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(10, 6, generator=generator) for _ in range(2 * count)]
    return Data(net, batches, 20 * count, owners=[n // 2 for n in range(2 * count)])


def test_a_check_predicts_from_weights_alone(folder: Path) -> None:
    found = check(planned(folder), NAMES)
    told = prediction_of(found)
    assert told is not None
    assert told.budget == "weights"
    assert {m.method["name"] for m in told.merges} == {"average", "task_arithmetic"}
    for merge in told.merges:
        assert merge.mean.low <= merge.mean.value <= merge.mean.high
        assert {*merge.experts} == {*NAMES}
    json.dumps(found.model_dump(mode="json"), allow_nan=False)


def test_own_inputs_come_from_all_batches_of_a_task() -> None:
    cut = [torch.arange(4.0), torch.arange(4.0, 8), torch.arange(8.0, 12), torch.arange(12.0, 13)]
    task, other = own_tasks(Data(net, cut, 13, owners=[0, 0, 0, 1]), 6)
    assert torch.cat([*task.batches]).tolist() == [0, 2, 4, 6, 8, 10]  # batches may be sorted
    assert torch.cat([*other.batches]).tolist() == [12]


def test_inputs_of_each_task_make_it_a_choice_of_methods(folder: Path) -> None:
    data = inputs()
    tasks = own_tasks(data)
    assert [sum(len(b) for b in task.batches) for task in tasks] == [16, 16, 16]
    steps: list[int] = []
    found = predict_by_inputs(
        planned(folder), NAMES, tasks, net, on_step=lambda _, done, of: steps.append(done)
    )
    assert found.budget == "unlabelled"
    assert steps == list(range(1, 13))
    means = [each.predicted.mean.value for each in found.merges]
    assert means == sorted(means, reverse=True)
    assert {m.method["name"] for m in found.merges} >= {"average", "ties", "tsv"}
    # what does not depend on the inputs is the same, however it was found
    again = check(planned(folder), NAMES).prediction
    assert again is not None
    assert [size["mean"] for size in again["sizes"]] == pytest.approx(
        [mean for _, mean in found.sizes], rel=1e-3
    )


def test_inputs_of_no_task_in_particular_leave_it_to_the_weights(folder: Path) -> None:
    data = Data(net, inputs().batches, 60)
    found = check(planned(folder), NAMES, data=data)
    assert found.prediction is not None
    assert found.prediction["budget"] == "weights"
    assert found.samples == 60


def test_an_expert_of_another_base_is_called_so(folder: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    other = {
        k: torch.randn(v.shape, generator=generator) * v.std()
        for k, v in net().state_dict().items()
    }
    save_file(other, folder / "stranger.safetensors")
    names = ("one", "two", "stranger")
    found = check(planned(folder, names), names)
    told = prediction_of(found)
    assert told is not None
    assert {*told.alarms} == {"stranger"}
    assert "stranger" in outlook(told).lines[0]
    assert prediction_of(check(planned(folder), NAMES)).alarms == {}  # type: ignore[union-attr]


def test_nothing_is_expected_where_nothing_moved(folder: Path) -> None:
    assert check(planned(folder, ("base", "one")), ("base", "one")).prediction is None
    assert check(planned(folder, ("one",)), ("one",)).prediction is None


def test_the_average_of_a_pair_by_either_door() -> None:
    total = torch.tensor([[100.0, 0, 0], [0, 1, 0.2], [0, 0.2, 1]])
    found = predict_by_weights(total, ["a", "b"])
    assert found.sizes == ((("a", "b"), found.sizes[0][1]),)
    assert found.drop is None
    even, uneven = (predict_by_weights(total, ["a", "b"], c).merges for c in ([1, 1], [3, 1]))
    assert even[0].predicted.experts[0] == even[0].predicted.experts[1]
    assert even != uneven


def test_the_figure_holds_every_point_and_this_merge(folder: Path) -> None:
    told = prediction_of(check(planned(folder), NAMES))
    assert told is not None
    drawn = scatter(told.model_copy(update={"points": ((0.5, 0.6), (0.9, 0.95), (0.9, 3.0))}))
    assert drawn.count('class="dot"') == 2  # one lies beyond the axes
    assert span(told.merges[0].mean) in drawn


def test_a_language_model_answers_at_every_position(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = MODELS["llama"]().eval()

    def factory() -> nn.Module:
        return MODELS["llama"]().eval()

    torch.save(base.state_dict(), tmp_path / "base.pt")
    for name in NAMES[:2]:
        moved = {k: v + 0.02 * torch.randn(v.shape) for k, v in base.state_dict().items()}
        torch.save(moved, tmp_path / f"{name}.pt")
    data = {"base": str(tmp_path / "base.pt"), "method": {"name": "average"}}
    experts = [{"path": str(tmp_path / f"{name}.pt")} for name in NAMES[:2]]
    plan = make_plan(make_recipe({**data, "experts": experts}))
    mask = torch.ones(16, 20, dtype=torch.int64)
    mask[::2, 12:] = 0  # padded to different lengths, and 256 answers of more are looked at
    batch = {"input_ids": torch.randint(3, 40, (16, 20)), "attention_mask": mask}
    tasks = own_tasks(Data(factory, [batch, {**batch}], 32, owners=[0, 1]))
    found = predict_by_inputs(plan, NAMES[:2], tasks, factory, methods=[{"name": "average"}])
    assert 0 <= found.best.predicted.mean.value <= 1.5
    assert found.best.predicted.outside, "the atlas holds no language model"
