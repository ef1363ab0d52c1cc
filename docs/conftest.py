"""Every code block of guides, concepts and the Python page is run, a page at a time, in order.

Python blocks of a page share their names; console blocks share a shell's variables and folder; a
YAML block that begins with `# NAME` is written to NAME. What is shown under a command has to come
out of it, with `...` for what varies.
"""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

SECONDS = 300
OTHERS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft on transformers
KEPT = "declare -p | grep -v '^declare -[a-zA-Z]*r' > .shell; pwd > .folder"


def setup(namespace: dict[str, Any]) -> None:
    """Open a folder for a page and go there."""
    namespace["before"] = Path.cwd()
    namespace["held"] = tempfile.TemporaryDirectory(prefix="mergewell-docs-")
    namespace["home"] = Path(namespace["held"].name)
    os.chdir(namespace["home"])


def teardown(namespace: dict[str, Any]) -> None:
    """Go back, and leave nothing."""
    os.chdir(namespace["before"])
    namespace["held"].cleanup()


def console(example: Example) -> str | None:
    """Run each line that begins with `$ ` and compare what follows it."""
    wanted: list[tuple[str, list[str]]] = []
    for line in example.parsed.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            wanted.append((line[2:], []))
        else:
            wanted[-1][1].append(line)
    for command, shown in wanted:
        found = run(command, example.namespace["home"])
        if found.returncode:
            return f"{command}\nended with {found.returncode}:\n{found.stdout}"
        expected, told = "\n".join(shown).strip() + "\n", found.stdout.strip() + "\n"
        if shown and not doctest._ellipsis_match(expected, told):
            return f"{command}\nshould give\n{expected}\nand gave\n{told}"
    return None


def run(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in the page's shell, both streams in one."""
    script = f"[ -f .shell ] && . ./.shell 2>/dev/null; {command}\nrc=$?; {KEPT}; exit $rc"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script], cwd=home, text=True, timeout=SECONDS, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": path, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def written(example: Example) -> None:
    """Write a YAML block to the file that its first line names."""
    first, _, rest = example.parsed.partition("\n")
    assert first.startswith("# "), "begin a YAML block with a comment: the file's name"
    (example.namespace["home"] / first[2:].strip()).write_text(rest)


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS),
        CodeBlockParser(language="console", evaluator=console),
        CodeBlockParser(language="yaml", evaluator=written),
    ],
    patterns=["guides/*.md", "concepts/*.md", "reference/python.md"],
    setup=setup,
    teardown=teardown,
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pass what other libraries say of one another."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(OTHERS))
