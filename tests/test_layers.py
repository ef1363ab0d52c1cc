"""Imports go down only, families' members do not import each other, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "mergewell"
LAYERS = [
    {"errors", "component", "tensor_group", "storage", "statistics", "linalg"},
    {"methods", "models", "kernels", "gram", "matrices", "low_rank"},
    {
        "recipe",
        "flags",
        "mergekit",
        "guidance",
        "guidance_states",
        "plan",
        "plan_checks",
        "changes",
        "run",
        "opening",
        "card",
        "mixture",
        "pipeline",
        "stages",
        "tokenizers",
        "blocks",
        "jobs",
        "verify",
        "extract",
        "extract_layout",
        "engines",
        "device",
        "inputs",
        "labelled",
        "repair",
        "repair_step",
    },
    {
        "diagnostics",
        "learners",
        "evaluate",
        "evaluation",
        "calibration",
        "companions",
        "restore",
        "routing",
        "descent",
        "neulig",
        "prediction",
        "explain",
        "alignment",
        "distil",
        "finetune",
        "surgery",
    },
    {"report", "tune", "partners", "advise", "check", "demo", "doctor"},
    {"cli", "api"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FAMILIES = {"methods", "diagnostics", "learners"}
FILES = sorted(SRC.rglob("*.py"))


def imports(text: str) -> list[str]:
    """Return the dotted names that a file imports, wherever in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(parts: tuple[str, ...], text: str) -> list[str]:
    """Return what a file at `parts` (below src/mergewell) must not import but does."""
    own = parts[0].removesuffix(".py")
    if own == "__init__":
        return []
    found: list[str] = []
    for name in imports(text):
        words = name.split(".")
        if words[0] != "mergewell" or len(words) < 2 or words[1] not in LEVEL:
            continue
        if LEVEL[words[1]] > LEVEL[own]:
            found.append(f"{'/'.join(parts)} imports {name} from a higher layer")
        member = parts[-1].removesuffix(".py")
        family = own in FAMILIES and words[1] == own and len(parts) == 2 and len(words) > 2
        if family and words[2] not in ("base", "ops", member):
            found.append(f"{'/'.join(parts)} imports its sibling {name}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_imports_go_down_only(file: Path) -> None:
    assert violations(file.relative_to(SRC).parts, file.read_text(encoding="utf-8")) == []


def test_the_rule_catches_upward_and_sideways_imports() -> None:
    assert violations(("methods", "x.py"), "from mergewell.run import run")
    assert violations(("methods", "x.py"), "from mergewell.methods.ties import Ties")
    assert violations(("storage", "x.py"), "def f():\n    import mergewell.plan")
    assert not violations(("methods", "x.py"), "from mergewell.methods import ops")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_files_stay_small(file: Path) -> None:
    parts = file.relative_to(SRC).parts
    limit = 120 if parts[0] in FAMILIES and parts[-1] not in ("base.py", "ops.py") else 400
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{lines} lines; which two ideas live in it?"


def test_every_module_has_a_place() -> None:
    top = {
        path.stem
        for path in SRC.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert top - {"__init__"} <= set(LEVEL)
