from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toys import family, recipe_of

from mergewell.errors import RecipeError
from mergewell.matrices import MatrixMerge, RefinedMerge, TaskMatrices
from mergewell.methods.base import Laws, TensorGroup
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties
from mergewell.plan import make_plan
from mergewell.run import merge_tensors


class Seen(MatrixMerge):
    """Returns the sum of the task matrices, row i times i + 1."""

    laws: ClassVar[Laws] = Laws()

    def combine(self, matrices: TaskMatrices) -> Tensor:
        assert matrices.total().shape == matrices.shape
        rows = torch.arange(1.0, matrices.shape[0] + 1)
        return rows[:, None] * matrices.total()


class Doubled(RefinedMerge):
    """Doubles what another method makes of matrices."""

    def refine(self, merged: Tensor, matrices: TaskMatrices) -> Tensor:
        assert merged.shape == matrices.shape
        return 2 * merged


def group(*shape: int, name: str = "layer.weight") -> TensorGroup:
    base = torch.full(shape, 5.0)
    return TensorGroup(name, (base + 1, base + 3), torch.tensor([1.0, 2.0]), base)


def test_matrices_are_the_task_vectors_times_their_coefficients() -> None:
    made = TaskMatrices("w", torch.ones(2, 3), (torch.zeros(2, 3),) * 2, torch.tensor([1.0, 4.0]))
    assert [float(m[0, 0]) for m in made] == [-1.0, -4.0]
    assert float(made.total()[0, 0]) == -5.0
    assert (len(made), made.shape, made.rank) == (2, (2, 3), 2)
    assert len(made[:1]) == 1 and made.drawn(0) != made.drawn(1)


def test_kernels_are_folded_to_outputs_by_the_rest() -> None:
    merged = Seen().merge(group(2, 3, 2, 2))
    assert merged.shape == (2, 3, 2, 2)
    assert merged[0].unique().tolist() == [5.0 + 7.0]
    assert merged[1].unique().tolist() == [5.0 + 14.0]


def test_parts_are_merged_each_by_itself() -> None:
    merged = Seen(parts=3).merge(group(6, 4))
    assert merged[:, 0].tolist() == [12.0, 19.0] * 3
    with pytest.raises(RecipeError, match=r"layer\.weight has 5 outputs, .* parts = 3"):
        Seen(parts=3).merge(group(5, 4))


def test_transposed_tensors_are_turned_and_turned_back() -> None:
    merged = Seen(transposed=True).merge(group(4, 2))
    assert merged.shape == (4, 2)
    assert merged[0].tolist() == [12.0, 19.0]
    both = Seen(transposed=True, parts=3).merge(group(4, 6))
    assert both[0].tolist() == [12.0, 19.0] * 3


@pytest.mark.parametrize("shape", [(), (4,), (0,), (1, 4), (4, 1, 1)])
def test_vectors_get_the_mean_task_vector_times_scale(shape: tuple[int, ...]) -> None:
    merged = Seen(scale=0.5).merge(group(*shape))
    torch.testing.assert_close(merged, torch.full(shape, 5 + 0.5 * 7 / 2))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "bert.embeddings.word_embeddings.weight",
        "shared.weight",
        "pos_embed",
        "patch_embed.proj.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "text_projection",
        "classifier.weight",
        "classifier.1.weight",
        "head.fc.weight",
        "heads.head.weight",
        "score.weight",
        "fc.weight",
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        "cls.predictions.transform.dense.weight",
    ],
)
def test_embeddings_and_heads_get_an_ordinary_method_that_the_plan_names(name: str) -> None:
    assert Seen(scale=0.5).for_tensor(name, shape=(4, 4), guided=False) == TaskArithmetic(
        scale=0.5, divide="count"
    )
    assert Seen(exclude="").for_tensor(name, shape=(4, 4), guided=False) == Seen(exclude="")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "encoder.layer.3.output.dense.weight",
        "conv_head.weight",
        "decoder.block.1.layer.2.DenseReluDense.wi.weight",
        "layer1.0.conv1.weight",
        "pooler.dense.weight",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
        "blocks.1.0.conv_dw.weight",
    ],
)
def test_inner_layers_are_matrices(name: str) -> None:
    assert Seen().for_tensor(name, shape=(4, 4), guided=False) == Seen()
    excluded = Seen(exclude="layer|conv|dec|bloc|pool")
    assert isinstance(excluded.for_tensor(name, shape=(4, 4), guided=False), TaskArithmetic)


@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (4, 1), (4, 1, 1, 1)])
def test_what_is_no_matrix_is_planned_as_what_it_gets(shape: tuple[int, ...]) -> None:
    others = TaskArithmetic(scale=0.5, divide="count")
    assert Seen(scale=0.5).for_tensor("layer.norm", shape=shape, guided=False) == others


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        Seen(exclude="(")


def test_an_inner_method_is_a_name_a_mapping_or_the_method() -> None:
    one = Doubled.model_validate({"of": {"name": "ties", "density": 0.4}})
    assert one.of == Ties(density=0.4)
    assert Doubled.model_validate({"of": "ties"}).of == Ties()
    assert Doubled.model_validate(one.parameters()) == one
    assert one.parameters()["of"]["name"] == "ties"
    assert one.statistics() == Ties(density=0.4).statistics()
    with pytest.raises(RecipeError, match="no method 'tie'"):
        Doubled.model_validate({"of": "tie"})
    with pytest.raises(RecipeError, match="ties has no parameter 'densty'"):
        Doubled.model_validate({"of": {"name": "ties", "densty": 1}})
    with pytest.raises(ValidationError, match="needs a name"):
        Doubled.model_validate({"of": {"density": 1}})


def test_a_result_is_refined_as_matrices_and_left_alone_elsewhere() -> None:
    inner = TaskArithmetic(scale=1.0)
    assert Doubled(of=inner).merge(group(3, 2)).unique().tolist() == [5 + 2 * 7]
    assert Doubled(of=inner, scale=0.5).merge(group(3, 2)).unique().tolist() == [5 + 7]
    assert Doubled(of=inner).merge(group(3)).unique().tolist() == [5 + 7]
    assert Doubled(of=inner, parts=3).merge(group(3, 2)).unique().tolist() == [5 + 2 * 7]
    assert Doubled(of=inner).for_tensor("lm_head.weight", shape=(4, 4), guided=False) == inner
    assert Doubled(of=inner).for_tensor("q.weight", shape=(4, 4), guided=False) == Doubled(of=inner)


def test_needs_are_those_of_the_inner_method_on_whole_matrices() -> None:
    needs = Doubled(of=Ties()).needs
    assert (needs.base, needs.granularity, needs.experts) == (True, "matrix", None)
    assert Doubled.model_validate({"of": "slerp"}).needs.experts == 2
    guided = Doubled.model_validate({"of": "m_ties"})
    assert guided.needs.calibration == ("m_loss",)
    assert guided.for_tensor("q.weight", shape=(4, 4), guided=False).needs.calibration == ()
    assert "divided" not in Doubled.model_validate({"of": "slerp"}).objection([1.0, 2.0])
    assert Doubled.model_validate({"of": "average"}).objection([1.0, -1.0])


def test_a_plan_names_what_embeddings_get_and_streams_them(tmp_path: Path) -> None:
    base, experts = family(tmp_path, experts=2)
    plan = make_plan(recipe_of(base, experts, {"name": "tsv", "scale": 0.5}))
    treated = {name: task.treatment for name, task in plan.tasks.items()}
    assert treated["embed.weight"] == "task_arithmetic"
    assert treated["layer.0.weight"] == treated["layer.1.weight"] == "tsv"
    assert plan.tasks["embed.weight"].method.needs.granularity == "element"
    merged = dict(merge_tensors(plan))
    plain = make_plan(
        recipe_of(base, experts, {"name": "task_arithmetic", "scale": 0.5, "divide": "count"})
    )
    same = {name: torch.equal(merged[name], t) for name, t in merge_tensors(plain)}
    assert same["embed.weight"] and same["layer.0.bias"] and same["scale"]
    assert not same["layer.0.weight"] and not same["layer.1.weight"]


def test_post_processors_take_a_guided_or_thresholded_method_through_a_plan(tmp_path: Path) -> None:
    base, experts = family(tmp_path, experts=2)
    of = {"name": "ties", "density": 0.3, "trim_scope": "model"}
    plain = dict(merge_tensors(make_plan(recipe_of(base, experts, of))))
    refined = make_plan(
        recipe_of(base, experts, {"name": "subspace_boosting", "beta": 1, "of": of})
    )
    for name, tensor in merge_tensors(refined):
        torch.testing.assert_close(tensor, plain[name])
