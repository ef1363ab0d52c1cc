"""Making modules and putting checkpoints into them."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mergewell.errors import ModelError
from mergewell.models.loader import ModuleSource, load_state


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("positions", torch.arange(4), persistent=False)


class Headed(nn.Module):
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Base(), nn.Linear(2, 2)


def make_base() -> nn.Module:
    torch.rand(1)
    return Base().double().train()


not_callable = 3


def make_nothing() -> int:
    return 3


def filled(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in module.state_dict().items()
    }


def test_a_state_is_copied_and_cast() -> None:
    module, wanted = Base(), filled(Base())
    loaded = load_state(module, {name: tensor.double() for name, tensor in wanted.items()})
    assert loaded.left_out == () and loaded.kept == ()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype
        assert tensor.data_ptr() != wanted[name].data_ptr()


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_prefixes_are_taken_off_or_put_on(prefix: str) -> None:
    wanted = filled(Base())
    load_state(module := Base(), {prefix + name: tensor for name, tensor in wanted.items()})
    assert torch.equal(module.layer.weight, wanted["layer.weight"])
    load_state(module := Headed(), filled(Headed(), prefix))
    assert torch.equal(module.head.weight, filled(Headed())["head.weight"])


def test_the_prefix_of_the_base_model() -> None:
    headed = filled(Headed())
    loaded = load_state(module := Base(), {f"model.{n}": t for n, t in filled(Base()).items()})
    module.base_model_prefix = "body"  # as transformers' base models say
    loaded = load_state(module, headed)
    assert loaded.left_out == ("head.weight", "head.bias")
    assert torch.equal(module.layer.weight, headed["body.layer.weight"])
    bare = {name.removeprefix("body."): tensor for name, tensor in headed.items()}
    load_state(module := Headed(), bare)
    assert torch.equal(module.body.layer.weight, headed["body.layer.weight"])
    assert torch.equal(module.head.weight, headed["head.weight"])


def test_missing_and_unexpected_names_are_one_error() -> None:
    state = filled(Base())
    state["layer.extra"] = state["layer.scale"] = state.pop("layer.weight")
    before = Base()
    with pytest.raises(ModelError) as caught:
        load_state(before, state)
    text = str(caught.value)
    assert "1 missing (layer.weight)" in text and "2 unexpected (layer.extra, layer.scale)" in text
    assert not torch.equal(before.layer.bias, state["layer.bias"])  # nothing was copied
    with pytest.raises(ModelError, match=r"8 missing \(.*, .*, .* and 5 more\)"):
        load_state(nn.ModuleDict({"a": Base(), "b": nn.Linear(1, 1)}), {})
    with pytest.raises(ModelError, match=r"missing \(head\.weight, head\.bias\)"):
        load_state(Headed(), filled(Base()))
    with pytest.raises(ModelError, match="2 unexpected"):
        load_state(nn.Sequential(nn.Linear(1, 1)), filled(nn.Sequential(*[nn.Linear(1, 1)] * 2)))


def test_two_tensors_never_fall_into_one() -> None:
    state = filled(Base(), "module.") | {"layer.weight": torch.zeros(2, 3)}
    with pytest.raises(ModelError, match="missing"):
        load_state(Base(), state)


def test_a_wrong_shape_is_an_error() -> None:
    state = filled(Base())
    state["layer.weight"] = torch.zeros(3, 3)
    with pytest.raises(ModelError, match=r"layer.weight has shape \(3, 3\) .* \(2, 3\)"):
        load_state(Base(), state)


def test_what_does_not_act_may_be_absent_and_is_listed() -> None:
    state = filled(Base())
    del state["norm.num_batches_tracked"]
    state["positions"] = torch.arange(9)  # saved by an older release
    loaded = load_state(Base(), state)
    assert loaded.kept == ("norm.num_batches_tracked",)
    assert loaded.left_out == ("positions",)


def test_tied_tensors_need_be_there_once() -> None:
    module = nn.ModuleDict({"table": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    module["head"].weight = module["table"].weight
    load_state(module, {"table.weight": torch.full((4, 3), 2.0)})
    assert bool((module["head"].weight == 2).all())


def test_a_factory_is_called_and_leaves_no_trace_in_the_random_state() -> None:
    source = ModuleSource.parse(f"{__name__}:make_base")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    module = pickle.loads(pickle.dumps(source)).build()
    assert torch.equal(before, torch.get_rng_state())
    assert not module.training and module.layer.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere", "names no model"),
        ("a-b:c", "names no model"),
        ("no_such_package.models:build", "cannot be imported"),
        (f"{__name__}:nothing", "has no function 'nothing'"),
        (f"{__name__}:not_callable", "has no function"),
        (f"{__name__}:make_nothing", "returned int"),
    ],
)
def test_bad_sources_are_named(text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ModuleSource.parse(text).build()


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_library_that_is_not_installed(library, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    source = str(tmp_path) if library == "transformers" else "timm:resnet18"
    with pytest.raises(ModelError, match=rf"needs {library}, .*pip install 'mergewell\[models\]'"):
        ModuleSource.parse(source).build()


def test_timm_models_are_made_without_weights(monkeypatch) -> None:
    class Timm:
        @staticmethod
        def create_model(name: str, *, pretrained: bool) -> nn.Module:
            if name != "tiny" or pretrained:
                raise RuntimeError(f"Unknown model ({name})")
            return Base()

    monkeypatch.setitem(sys.modules, "timm", Timm)
    assert isinstance(ModuleSource.parse("timm:tiny").build(), Base)
    with pytest.raises(ModelError, match=r"no model 'other' \(Unknown model \(other\)\)"):
        ModuleSource.parse("timm:other").build()


def test_a_hugging_face_folder(minilm_folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    module = ModuleSource.parse(minilm_folder).build()
    state = safetensors.load_file(f"{minilm_folder}/model.safetensors")
    loaded = load_state(module, state)
    pooler = ("pooler.dense.bias", "pooler.dense.weight")
    assert set(loaded.left_out) == {"embeddings.position_ids", *pooler}
    assert not module.training
    wanted = transformers.AutoModel.from_pretrained(minilm_folder, add_pooling_layer=False).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(module(tokens).last_hidden_state, wanted(tokens).last_hidden_state)
    load_state(module, {f"bert.{name}": tensor for name, tensor in state.items()})


def test_hugging_face_configurations(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"model_type": "bert", "vocab_size": 20, "dtype": "bfloat16", **small})
    )
    module = ModuleSource.parse(tmp_path).build()
    assert isinstance(module, transformers.BertModel)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    config = json.loads(path.read_text()) | {"architectures": ["BertForSequenceClassification"]}
    path.write_text(json.dumps(config))
    headed = ModuleSource.parse(tmp_path).build()
    assert isinstance(headed, transformers.BertForSequenceClassification)
    with pytest.raises(ModelError, match=r"missing \(.*classifier.weight.*\)"):
        load_state(headed, filled(module))
    path.write_text("{}")
    with pytest.raises(ModelError, match=r"no config\.json that transformers understands"):
        ModuleSource.parse(tmp_path).build()
