"""What the merged model is to say: targets by aim, losses by hand, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from families import factory, tiny_family
from safetensors.torch import load_file
from torch import Tensor, nn

from mergewell.descent.tasks import LearningTask, loss, targets
from mergewell.errors import DataError
from mergewell.plan import Plan, make_plan
from mergewell.recipe import make_recipe


def planned(folder: Path) -> Plan:
    base, experts = tiny_family(folder, 2)
    return make_plan(
        make_recipe({"base": str(base), "experts": [{"path": str(p)} for p in experts]})
    )


def expert_logits(folder: Path, number: int, inputs: Tensor) -> Tensor:
    module = factory()
    module.load_state_dict(load_file(folder / f"{number}.safetensors"))
    with torch.no_grad():
        return module(inputs)


def test_targets_are_what_the_task_s_expert_or_all_say(tmp_path: Path) -> None:
    plan, x = planned(tmp_path), torch.randn(6, 4)
    tasks = [LearningTask(1, [x[:3], x[3:]]), LearningTask(0, [x])]
    by_expert = targets("expert", tasks, plan, factory, temperature=2.0)
    own = (expert_logits(tmp_path, 1, x[3:]) / 2).softmax(-1)
    torch.testing.assert_close(by_expert[0][1], own)
    together = targets("ensemble", tasks, plan, factory)
    mean = (expert_logits(tmp_path, 0, x) + expert_logits(tmp_path, 1, x)) / 2
    torch.testing.assert_close(together[1][0], mean.softmax(-1))
    assert targets("entropy", tasks, plan, factory) == [[None, None], [None]]


def test_losses_by_hand() -> None:
    even = torch.zeros(5, 4)
    assert float(loss("entropy", even, None)) == pytest.approx(math.log(4))
    sure = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(5, 4)
    assert float(loss("expert", even, sure)) == pytest.approx(math.log(4))
    assert float(loss("expert", even, even.softmax(-1))) == pytest.approx(0.0, abs=1e-7)
    labels = torch.tensor([0, 1, -100, 3, 2])
    assert float(loss("labels", even, labels)) == pytest.approx(math.log(4))


class Tagger(nn.Module):
    """Says of each token its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        del attention_mask
        return self.embedding(input_ids)


def test_padding_is_left_out_of_logits_and_labels(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.tensor([[1, 2, 0], [3, 0, 0]]), "attention_mask": mask}
    labels = torch.tensor([[0, 1, -100], [2, -100, -100]])
    task = LearningTask(0, [batch], [labels])
    module = Tagger()
    torch.testing.assert_close(
        task.logits(module, batch), module.embedding(torch.tensor([1, 2, 3]))
    )
    said = targets("labels", [task], planned(tmp_path), factory)[0][0]
    assert said is not None and said.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        ([], "give some"),
        ([LearningTask(0, [])], "no inputs"),
        ([LearningTask(5, [torch.zeros(1, 4)])], "there are 2"),
        ([LearningTask(0, [torch.zeros(1, 4)])], "labels for 0 of 1"),
        ([LearningTask(None, [torch.zeros(1, 4)])], "labels for 0 of 1"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    tmp_path: Path, tasks: list[LearningTask], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        targets("labels", tasks, planned(tmp_path), factory)


def test_an_expert_s_answers_need_to_know_whose_the_inputs_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not whose the inputs are"):
        targets("expert", [LearningTask(None, [torch.zeros(1, 4)])], planned(tmp_path), factory)
