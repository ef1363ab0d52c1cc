"""The Hub: a server here speaks its protocol, and the network is never asked."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from toys import family

from mergewell.card import write_card
from mergewell.errors import CheckpointError
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run
from mergewell.storage.hub import is_on_hub, local_path
from mergewell.storage.manifest import read_manifest

pytest.importorskip("huggingface_hub")
COMMIT = "a" * 40


class Server(ThreadingHTTPServer):
    """Repositories by name, each a folder, at one commit that is also called main."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.repositories.get(name)
        if folder is None:
            return self.reply(404, {}, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if len(rest) > 1 and rest[1] not in (COMMIT, "main"):
            return self.reply(404, {}, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file for file in folder.iterdir() if file.is_file())
        if api and rest[0] == "tree":
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)}
                for f in files
            ]
            return self.reply(200, entries, None, body)
        if api:
            info = {
                "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": [{"rfilename": f.name} for f in files],
            }  # fmt: skip
            return self.reply(200, info, None, body)
        file = folder / rest[2]
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, None, file.read_bytes(), body, headers)

    def reply(
        self, code: int, data: Any, content: bytes | None, body: bool, headers: Any = None
    ) -> None:
        text = json.dumps(data).encode() if content is None else content
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    base, experts = family(tmp_path / "toys", experts=1)
    for folder in (base, *experts):
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "pytorch_model.bin").write_bytes(b"not wanted")
    (experts[0] / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / "toys" / "empty").mkdir()
    (tmp_path / "toys" / "empty" / "config.json").write_text("{}")
    repositories = {
        "org/base": base,
        "org/expert": experts[0],
        "org/no-weights": tmp_path / "toys" / "empty",
    }
    with Server(repositories) as found:
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        constants = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield found
        found.shutdown()


def test_models_of_the_hub_are_merged(server: Server, tmp_path: Path) -> None:
    expert = f"org/expert@{COMMIT}"
    recipe = make_recipe({"base": "org/base@main", "experts": [{"path": expert}]})
    plan = make_plan(recipe)
    assert plan.reference.path.name == COMMIT
    assert [file.name for file in plan.experts[0].side_files] == ["tokenizer.json"]
    run(plan, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.recipe["experts"][0]["path"] == expert
    assert all(COMMIT in file.path for file in manifest.inputs)
    assert torch.equal(plan.experts[0]["scale"], make_plan(recipe).experts[0]["scale"])
    assert not any(path.endswith(".bin") for path in server.asked)
    card = write_card(tmp_path / "out").read_text()
    assert "license: mit" in card
    assert f"- {expert}" in card


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("org/absent@main", "org/absent is not on the Hub, or not for you"),
        ("org/base@v9", "org/base has no revision 'v9'"),
        ("org/no-weights@main", "neither .safetensors nor .bin"),
    ],
)
def test_what_is_not_there_is_said(server: Server, path: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        local_path(path)


def test_no_server_and_no_library(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"org/base@main cannot be fetched"):
        local_path("org/base@main")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mergewell\[hub\]'"):
        local_path("org/base@main")


def test_only_names_with_a_revision_are_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    names = ["org/name", "org/name@v1.0", "org/name@main", "a/b/c@x", "./org/x", "/abs/x@y", "x@y"]
    assert [is_on_hub(name) for name in names] == [False, True, False, False, False, False, False]
    with pytest.raises(CheckpointError, match="or ORG/NAME@REVISION to fetch it"):
        make_plan(make_recipe({"experts": [{"path": "org/other"}]}))
