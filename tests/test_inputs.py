"""Calibration data: texts, images and named inputs, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergewell.errors import DataError
from mergewell.inputs import (
    ImageFormat,
    batches,
    batches_by_length,
    load_inputs,
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer of a few words, made on the spot."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "big", "cat", "sat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 4)) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(exist_ok=True)
    image.new("RGB", size, colour).save(path)


def test_texts_are_tokenised_and_padded(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a cat"}\n\n"a big cat sat"\n{"text": "cat", "label": 1}\n')
    inputs = load_inputs(path, model_folder=tokenizer_folder)
    assert inputs["input_ids"].tolist() == [
        [2, 5, 7, 3, 0, 0],
        [2, 5, 6, 7, 8, 3],
        [2, 7, 3, 0, 0, 0],
    ]
    assert inputs["attention_mask"].sum(1).tolist() == [4, 6, 3]
    assert load_inputs(path, model_folder=tokenizer_folder, tokens=4)["input_ids"].shape == (3, 4)


def test_samples_are_taken_at_even_distances(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "rows.safetensors"
    save_file({"x": torch.arange(10), "y": torch.arange(10) * 2}, path)
    chosen = load_inputs(path, limit=4)
    assert chosen["x"].tolist() == [0, 2, 5, 7] and chosen["y"].tolist() == [0, 4, 10, 14]
    assert load_inputs(path, limit=99)["x"].tolist() == list(range(10))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"a"\n"big"\n"cat"\n"sat"\n')
    assert load_inputs(texts, model_folder=tokenizer_folder, limit=2)["input_ids"][
        :, 1
    ].tolist() == [
        5,
        7,
    ]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_named_inputs(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"inputs.{suffix}"
    arrays = {"ids": np.arange(6).reshape(3, 2), "weights": np.ones((3, 1))}
    if suffix == "npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    inputs = load_inputs(path)
    assert inputs["ids"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert inputs["ids"].dtype == torch.int64 and inputs["weights"].dtype == torch.float32


def test_a_single_tensor_needs_no_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", whatever=np.ones((2, 3)))
    assert torch.equal(load_inputs(tmp_path / "one.npz"), torch.ones(2, 3))


def test_images_are_resized_and_normalised(tmp_path: Path) -> None:
    write_image(tmp_path / "b" / "two.png", (255, 0, 51))
    write_image(tmp_path / "a" / "one.JPG", (127, 127, 127), size=(3, 9))
    (tmp_path / "LICENSE.txt").write_text("free")
    form = ImageFormat((4, 6), mean=(0.2, 0.0, 0.2), std=(0.5, 1.0, 1.0))
    found = load_inputs(tmp_path, images=form)
    assert found.shape == (2, 3, 4, 6)
    wanted = torch.tensor([(1 - 0.2) / 0.5, 0.0, 0.0])
    torch.testing.assert_close(found[1], wanted[:, None, None].expand(3, 4, 6))
    assert load_inputs(tmp_path, images=form, limit=1).shape[0] == 1


def test_the_image_format_of_a_model_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 15:25] = 255  # the middle is white
    (tmp_path / "images").mkdir()
    image.fromarray(pixels).save(tmp_path / "images" / "stripe.png")
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    cropped = {"size": {"shortest_edge": 10}, "crop_size": {"height": 10, "width": 10}}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config | cropped))
    found = load_inputs(tmp_path / "images", model_folder=tmp_path)
    torch.testing.assert_close(found, torch.ones(1, 3, 10, 10))
    path.write_text(json.dumps(config | cropped | {"do_center_crop": False}))
    assert load_inputs(tmp_path / "images", model_folder=tmp_path).shape == (1, 3, 10, 10)
    path.write_text(json.dumps(config | {"size": {"height": 4, "width": 8}}))
    found = load_inputs(tmp_path / "images", model_folder=tmp_path)
    assert found.shape == (1, 3, 4, 8) and float(found.min()) == -1
    path.write_text(json.dumps(config | {"size": 5}))
    assert load_inputs(tmp_path / "images", model_folder=tmp_path).shape == (1, 3, 5, 5)
    path.write_text("{}")
    with pytest.raises(DataError, match="does not state an image size"):
        load_inputs(tmp_path / "images", model_folder=tmp_path)


def test_batches_cover_everything_in_order() -> None:
    x = torch.arange(7)
    assert [part.tolist() for part in batches(x, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    parts = list(batches({"x": x, "y": -x}, 4))
    assert [part["y"].tolist() for part in parts] == [[0, -1, -2, -3], [-4, -5, -6]]
    with pytest.raises(DataError, match="at least 1"):
        list(batches(x, 0))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.npz", None, "no calibration data at"),
        ("data.csv", b"a", "no calibration data that mergewell reads"),
        ("empty.jsonl", b"\n\n", "holds no texts"),
        ("bad.jsonl", b'"a"\n{"text": \n', "line 2 is not JSON"),
        ("odd.jsonl", b'"a"\n{"sentence": "b"}\n', "line 2 holds no text"),
        ("list.jsonl", b"[1]\n", "line 1 holds no text"),
        ("bytes.jsonl", b'"\xff"\n', "not UTF-8"),
        ("bad.npz", b"nonsense", "no npz file"),
        ("cut.npz", b"PK\x03\x04nonsense", "no npz file"),
        ("bad.safetensors", b"nonsense", "no readable safetensors"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_inputs(tmp_path / name, model_folder=tmp_path)
    assert name in str(caught.value)


def test_bad_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    for arrays, words in (
        ({"x": np.ones((2, 1)), "y": np.ones((3, 1))}, r"x: 2, y: 3"),
        ({"x": np.ones((0, 1))}, "no samples in x"),
        ({"x": np.float32(1)}, "no samples in x"),
        ({"x": np.array([{}])}, "plain numeric arrays"),
        ({"x": np.array(["a"])}, "plain numeric arrays"),
        ({}, "no samples"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=words):
            load_inputs(path)
    with pytest.raises(DataError, match="at least 1"):
        load_inputs(path, limit=0)


def test_bad_image_folders_are_named(tmp_path: Path) -> None:
    form = ImageFormat((4, 4))
    with pytest.raises(DataError, match="holds no images"):
        load_inputs(tmp_path, images=form)
    with pytest.raises(DataError, match=r"preprocessor_config\.json"):
        load_inputs(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"broken\.png is no readable image"):
        load_inputs(tmp_path, images=form)


def test_texts_need_a_tokenizer_and_transformers(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('"a"\n')
    with pytest.raises(DataError, match="need a model folder"):
        load_inputs(path)
    with pytest.raises(DataError, match="no tokenizer that transformers can load"):
        load_inputs(path, model_folder=tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"pip install 'mergewell\[models\]'"):
        load_inputs(path, model_folder=tmp_path)


def test_texts_stand_with_others_of_their_length_and_lose_padding_none_needs() -> None:
    lengths = [2, 5, 3, 5, 1]
    mask = torch.tensor([[int(place < length) for place in range(6)] for length in lengths])
    ids = torch.arange(30).view(5, 6)
    whole = torch.arange(5)
    cut = list(batches_by_length({"input_ids": ids, "attention_mask": mask, "whole": whole}, 2))
    assert [batch["whole"].tolist() for batch in cut] == [[1, 3], [2, 0], [4]]  # longest first
    assert [batch["input_ids"].shape for batch in cut] == [(2, 5), (2, 3), (1, 1)]
    for batch in cut:  # and every token is there
        for row, kept, number in zip(*batch.values(), strict=True):
            assert row[kept.bool()].tolist() == ids[number, : lengths[number]].tolist()


def test_padding_at_the_beginning_and_inputs_without_a_mask_stay() -> None:
    ids = torch.arange(6).view(2, 3)
    left = torch.tensor([[0, 0, 1], [0, 1, 1]])
    (batch,) = batches_by_length({"input_ids": ids, "attention_mask": left}, 8)
    assert batch["input_ids"].shape == (2, 3)
    (plain,) = batches_by_length({"input_ids": ids}, 8)
    assert torch.equal(plain["input_ids"], ids)
    with pytest.raises(DataError, match="at least 1"):
        list(batches_by_length({"input_ids": ids, "attention_mask": left}, 0))
