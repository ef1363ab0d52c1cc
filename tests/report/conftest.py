"""What the report's tests share: results as the demo makes them, and a browser without network."""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import random
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TASKS = ["mnist", "fashion_mnist", "kannada", "sign_digits"]
WIDTHS = [96, 144, 144, 240, 240, 480, 480, 480, 672, 672, 672, 1152, 1152, 1152, 1152]


def _layers() -> list[dict[str, Any]]:
    names = [("_conv_stem", 32), ("_blocks.0._depthwise_conv", 32)]
    for index, width in enumerate(WIDTHS, start=1):
        names += [
            (f"_blocks.{index}.{part}", width) for part in ("_expand_conv", "_depthwise_conv")
        ]
    names.append(("_conv_head", 1280))
    dice, rows = random.Random(7), []
    for depth, (name, nodes) in enumerate(names):
        scale = 0.004 * math.exp(0.09 * depth) * (2.5 if "depthwise" in name else 1.0)
        node = [dice.lognormvariate(0, 1.3) * scale**2 for _ in range(nodes)]
        relative = min(scale * dice.uniform(0.7, 1.4) * 4, 0.6)
        absolute = math.sqrt(sum(node))
        rows.append(
            {"layer": name, "activation": "relu6", "nodes": nodes, "absolute": absolute}
            | {"relative": relative, "node": node}
            | {"kind": "activation", "mean_gap": absolute / 3, "expected_gap": absolute / 3.3}
            | {"ratio": 1.1, "agreement": 0.93, "bound": absolute * 2.0}
        )
    for index, kind in enumerate(["attention", "block", "block", "output"]):
        name = "(output)" if kind == "output" else f"_blocks.{index}"
        rows.append(
            {"layer": name, "activation": kind, "nodes": 8, "absolute": 0.4}
            | {"relative": 0.031 * (index + 1), "kind": kind}
            | ({"heads": [0.01, 0.02, 0.123, 0.04]} if kind == "attention" else {})
        )
    return rows


def _by_task(*values: float) -> dict[str, float]:
    return dict(zip(TASKS, values, strict=True))


def _around(values: dict[str, float], reach: float) -> dict[str, list[float]]:
    table = {task: [max(x - reach, 0), min(x + reach * 0.8, 1)] for task, x in values.items()}
    mean = sum(values.values()) / len(values)
    return table | {"mean": [mean - reach / 2, mean + reach / 2]}


def _example() -> dict[str, Any]:
    layers = _layers()
    uncovered = [f"_blocks.{index}._project_conv" for index in range(16)]
    accuracy: dict[str, Any] = {
        "base": _by_task(0.812, 0.706, 0.571, 0.488),
        "expert": _by_task(0.984, 0.893, 0.967, 0.951),
        "ensemble": _by_task(0.942, 0.817, 0.836, 0.741),
        "merged": {
            "average": _by_task(0.921, 0.786, 0.778, 0.672),
            "task_arithmetic": _by_task(0.951, 0.808, 0.859, 0.769),
            "ties": _by_task(0.956, 0.821, 0.873, 0.802),
        },
    }
    intervals = {name: _around(accuracy[name], 0.018) for name in ("base", "expert", "ensemble")}
    merged = {name: _around(table, 0.02) for name, table in accuracy["merged"].items()}
    command = (
        "mergewell merge --base efficientnet-lite0 --expert experts/mnist --expert "
        "experts/fashion_mnist --expert experts/kannada --expert experts/sign_digits "
        "--method ties --set density=0.2 --out merged/ties"
    )
    norms = _by_task(0.0113, 0.0162, 0.0151, 0.0217)
    cosines = [
        [1.0, 0.031, 0.118, 0.062],
        [0.031, 1.0, -0.014, 0.027],
        [0.118, -0.014, 1.0, 0.081],
        [0.062, 0.027, 0.081, 1.0],
    ]
    check = {
        "version": 1,
        "base": "efficientnet-lite0",
        "experts": TASKS,
        "samples": 256,
        "mode": "merged",
        "layers": layers,
        "predictors": {
            "m_loss_mean": 0.0912,
            "cosine": cosines,
            "mean_cosine": 0.051,
            "sign_conflict": 0.213,
        }
        | {f"relative_norm:{name}": norm for name, norm in norms.items()},
        "prediction": None,
        "verdict": "These experts will merge with care: most layers agree, a few deep ones do not.",
        "level": "fair",
        "uncovered": [*uncovered, "_fc"],
        "uncovered_reasons": dict.fromkeys(uncovered, "linear: no activation follows")
        | {"_fc": "the head is frozen and the same in every expert"},
        "findings": [
            {
                "question": "Do averaged weights act like averaged outputs?",
                "verdict": "In most layers; not in the last depthwise convolutions.",
                "level": "fair",
                "where": "_blocks.15._depthwise_conv",
                "value": 0.364,
                "unit": "relative M-Loss, median over layers",
                "advice": "Lower the coefficients, or trim with ties.",
            },
            {
                "question": "Do the experts move in different directions?",
                "verdict": "Yes: the task vectors are nearly orthogonal.",
                "level": "good",
                "where": "mnist, kannada",
                "value": 0.118,
                "unit": "cosine",
                "advice": "",
            },
            {
                "question": "Do the experts move equally far?",
                "verdict": "sign_digits moves twice as far as mnist.",
                "level": "good",
                "where": None,
                "value": 2.04,
                "unit": "largest / smallest norm",
                "advice": "",
            },
            {
                "question": "Do the experts pull against each other?",
                "verdict": "A third of the mass meets another sign.",
                "level": "poor",
                "where": "_conv_head",
                "value": 0.334,
                "unit": "fraction of the mass",
                "advice": "Elect signs before averaging: ties does.",
            },
            {
                "question": "Do the models still see the inputs alike?",
                "verdict": "Less and less towards the end.",
                "level": "fair",
                "where": "_blocks.15",
                "value": 0.9971,
                "unit": "linear CKA, unbiased, median over blocks",
                "advice": "Repair the merged features.",
                "decides": False,
                "by_place": {f"_blocks.{i}": 1 - 0.0012 * i**1.5 for i in range(16)},
            },
            {
                "question": "Does the loss rise between the models?",
                "verdict": "Most between mnist and kannada.",
                "level": "poor",
                "where": "mnist, kannada",
                "value": 1.31,
                "unit": "nats of cross-entropy",
                "advice": "",
                "decides": False,
                "by_place": {"mnist, kannada": 1.31, "mnist, sign_digits": 0.4, "a, b": 0.02},
            },
        ],
    }
    experts = sum(accuracy["expert"].values())
    mean = {name: sum(table.values()) / experts for name, table in accuracy["merged"].items()}
    return {
        "version": 1,
        "title": "Four digits and clothes experts",
        "tasks": TASKS,
        "models": {"base": "efficientnet-lite0", "experts": TASKS},
        "accuracy": accuracy,
        "intervals": intervals | {"merged": merged},
        "ensemble_kind": "logits",
        "retention": {
            name: {"mean": x, "low": x - 0.011, "high": x + 0.01}
            | {"worst": {"task": "sign_digits", "value": x - 0.07}}
            for name, x in mean.items()
        },
        "agreement": {name: _by_task(0.93, 0.84, 0.88, 0.79) for name in mean},
        "kl": {name: _by_task(0.11, 0.24, 0.19, 0.31) for name in mean},
        "m_loss": layers,
        "cosines": cosines,
        "norms": norms,
        "sign_conflict": 0.213,
        "check": check,
        "merges": [
            {
                "method": name,
                "recipe": f"base: efficientnet-lite0\nmethod: {{name: {name}}}\n",
                "path": f"merged/{name}",
                "command": command.replace("ties", name),
            }
            for name in mean
        ],
        "seconds": {"check": 14.2, "merge": 1.1, "evaluate": 21.8, "report": 0.3},
        "examples": dict.fromkeys(TASKS, 1000),
        "versions": {"mergewell": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
        "report": "index.html",
    }


EXAMPLE = _example()


@pytest.fixture(scope="session")
def unchanged_example() -> dict[str, Any]:
    """The example for tests that only read it."""
    return EXAMPLE


@pytest.fixture
def example() -> dict[str, Any]:
    """Results as the demo makes them: 4 tasks, 3 merges, 33 layers of up to 1280 nodes."""
    return copy.deepcopy(EXAMPLE)


class Browser:
    """A headless Chromium without network, driven over a pipe by its own protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        """Start Chromium with an empty profile."""
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        # Chromium reads orders from descriptor 3 and writes answers to 4.
        wired = f'exec "$0" "$@" 3<&{orders} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", wired, program, *arguments, f"--user-data-dir={profile}"],
            pass_fds=(orders, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(orders)
        os.close(answers)
        self._count, self._unread, self._session = 0, b"", ""
        self.asked_for: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        offline = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.call("Network.emulateNetworkConditions", offline=True, **offline)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send one order and return its answer."""
        self._count += 1
        order = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            order["sessionId"] = self._session
        os.write(self._orders, json.dumps(order).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._count:
                assert "error" not in message, f"{method}: {message.get('error')}"
                return message["result"]

    def open(self, page: Path, *, width: int, scheme: str = "light", scripts: bool = True) -> None:
        """Open a page at a width, in the light or dark scheme, with or without scripts."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        # A theme that an earlier test chose must not colour this one.
        self.call("Storage.clearDataForOrigin", origin="file://", storageTypes="local_storage")
        self.call("Page.navigate", url=page.as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, path: Path) -> Path:
        """Save a picture of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def close(self) -> None:
        """End Chromium and close the pipes."""
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._orders)
        os.close(self._answers)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], 30)
            part = os.read(self._answers, 1 << 16) if ready else b""
            assert part, "Chromium did not answer for 30 s, or ended."
            self._unread += part
        whole, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(whole)
        if message.get("method") == "Network.requestWillBeSent":
            self.asked_for.append(message["params"]["request"]["url"])
        return message


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests; its absence is a failure, since CI installs it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    assert program, "Chromium is not installed; the page is tested in it: apt-get install chromium."
    chromium = Browser(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()
