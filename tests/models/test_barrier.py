"""Losses between two models: on networks whose line is known, with BatchNorm, masks and errors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.models.barrier import IGNORED, measure_path, pseudo_labels, score


class Squared(nn.Module):
    """Logits (w^2 x, 0): the loss between w = -1 and w = 1 has its barrier at w = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.w.square() * x, torch.zeros_like(x)], dim=1)


ENDS = ({"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])})


def test_a_barrier_that_is_known() -> None:
    batches = [torch.full((3, 1), 2.0), torch.full((1, 1), 2.0)]
    labels = [torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
    path = measure_path(Squared(), *ENDS, batches=batches, labels=labels, names=("a", "b"))
    assert path.points == pytest.approx([k / 10 for k in range(11)]) and path.samples == 4
    expected = [math.log(1 + math.exp(-2 * (2 * p - 1) ** 2)) for p in path.points]
    assert path.losses == pytest.approx(expected)
    assert path.barrier == pytest.approx(math.log(2) - math.log(1 + math.exp(-2)))
    assert path.accuracies == (1.0,) * 11 and path.accuracy_barrier == 0
    # the middle's output is zero and has no direction
    assert math.isnan(path.linearity) and path.ends == pytest.approx(1)
    assert (path.answers, path.norms) == ("labels", "as stored")


def test_pseudo_labels_are_those_of_the_ends_together() -> None:
    module = nn.Linear(1, 2, bias=False)
    ends = [{"weight": torch.tensor([[1.0], [0.0]])}, {"weight": torch.tensor([[0.0], [3.0]])}]
    path = measure_path(module, *ends, batches=[torch.ones(5, 1)], points=3)
    assert path.answers == "pseudo-labels"
    assert path.accuracies == (0.0, 1.0, 1.0), "the mean (0.5, 1.5) answers 1"
    assert path.linearity == pytest.approx(1) and path.ends == pytest.approx(0)


def test_a_head_and_named_inputs_with_padding() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            del attention_mask
            return {"hidden": self.embedding(input_ids)}

    ids, mask = torch.tensor([[0, 1, 2], [3, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch: Mapping[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    generator = torch.Generator().manual_seed(0)
    ends = [{"embedding.weight": torch.randn(4, 3, generator=generator)} for _ in range(2)]
    head = torch.randn(3, 5, generator=generator)
    path = measure_path(Tokens(), *ends, batches=[batch], head=lambda f: f @ head, points=3)
    assert path.samples == 4
    middle = [((ends[0]["embedding.weight"] + ends[1]["embedding.weight"]) / 2)[ids] @ head]
    answers = middle[0].argmax(-1)
    kept = mask.bool()
    assert path.losses[1] == pytest.approx(
        float(functional.cross_entropy(middle[0][kept], answers[kept])), rel=1e-5
    )


def test_the_ends_are_met_exactly_and_integers_are_the_starts() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    generator = torch.Generator().manual_seed(0)
    ends = [
        {"w": torch.randn(2, generator=generator).bfloat16(), "steps": torch.tensor(k)}
        for k in (3, 5)
    ]
    module = Counted()
    path = measure_path(module, *ends, batches=[torch.ones(1, 2)], points=3)
    scores = [score([e["w"].float()[None]], [torch.tensor([_answer(ends)])])[0] for e in ends]
    assert [path.losses[0], path.losses[-1]] == scores
    assert int(module.get_buffer("steps")) == 3


def _answer(ends: list[dict[str, Tensor]]) -> int:
    return int((ends[0]["w"].float() + ends[1]["w"].float()).argmax())


def batch_norm_ends(mean: float) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    generator = torch.Generator().manual_seed(0)
    ends: list[dict[str, Tensor]] = []
    for share in (0.0, 1.0):
        state = {n: t.clone() for n, t in module.state_dict().items()}
        state["0.weight"] = torch.randn(2, 3, generator=generator)
        state["1.running_mean"] += share * mean
        ends.append(state)
    return module, ends


def test_batch_norms_are_measured_anew_where_the_ends_differ_in_them() -> None:
    batches = [torch.randn(50, 3, generator=torch.Generator().manual_seed(1))]
    module, ends = batch_norm_ends(2.0)
    path = measure_path(module, *ends, batches=batches, points=3)
    assert path.norms == "re-estimated"
    seen = batches[0] @ ((ends[0]["0.weight"] + ends[1]["0.weight"]) / 2).T
    seen = (seen - seen.mean(0)) / (seen.var(0) + 1e-5).sqrt()
    given = [torch.zeros(50, dtype=torch.int64)]
    labelled = measure_path(module, *ends, batches=batches, labels=given, points=3)
    assert labelled.losses[1] == pytest.approx(score([seen], given)[0], rel=1e-4)
    stored = measure_path(module, *ends, batches=batches, points=3, norms="as stored")
    assert stored.norms == "as stored" and stored.losses != path.losses


def test_batch_norms_trained_in_eval_mode_stay_as_they_are() -> None:
    module, ends = batch_norm_ends(0.0)
    path = measure_path(module, *ends, batches=[torch.randn(5, 3)], points=3)
    assert path.norms == "as stored" and not module.training


def test_padding_is_left_out_of_the_answers() -> None:
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    mask = {"attention_mask": torch.tensor([[1, 0]])}
    assert pseudo_labels(logits, mask).tolist() == [[1, IGNORED]]
    assert pseudo_labels(logits, torch.zeros(1)).tolist() == [[1, 0]]
    loss, accuracy = score([logits], [pseudo_labels(logits, mask)])
    assert loss == pytest.approx(math.log(1 + math.exp(-1))) and accuracy == 1


def test_mistakes_are_named() -> None:
    batches = [torch.ones(2, 1)]
    with pytest.raises(RecipeError, match="no middle"):
        measure_path(Squared(), *ENDS, batches=batches, points=4)
    with pytest.raises(DataError, match="no batches"):
        measure_path(Squared(), *ENDS, batches=[])
    with pytest.raises(DataError, match="2 batches of labels are given for 1"):
        measure_path(Squared(), *ENDS, batches=batches, labels=[torch.zeros(2).long()] * 2)
    with pytest.raises(DataError, match="do not fit logits"):
        measure_path(Squared(), *ENDS, batches=batches, labels=[torch.zeros(3).long()])
    with pytest.raises(DataError, match="No answer is left"):
        measure_path(Squared(), *ENDS, batches=batches, labels=[torch.full((2,), IGNORED)])
    with pytest.raises(ModelError, match="extra is in only one"):
        measure_path(Squared(), ENDS[0], {**ENDS[1], "extra": torch.ones(1)}, batches=batches)
