"""Write docs/reference from the code: `make docs`; `--check` only compares.

The pages are the same texts that `mergewell methods NAME` and `mergewell COMMAND --help` show.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import sys
from pathlib import Path

from mergewell.cli.commands import describe_method
from mergewell.cli.main import main as run_command
from mergewell.methods.base import METHODS

REFERENCE = Path(__file__).parent / "reference"
COMMANDS = ("demo", "check", "plan", "merge", "report", "verify", "methods")


def methods_page() -> str:
    """Return the page of all methods."""
    lines = ["# Methods", "", "Made from the code by `make docs`.", ""]
    for name in METHODS.names():
        cls = METHODS.get(name)
        lines += [f"## {name}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
        parameters = describe_method(name)["parameters"]
        if parameters:
            lines += ["| parameter | type | default | |", "|---|---|---|---|"]
            lines += [
                "| `{name}` | {type} | `{default}` | {help} |".format(
                    **{**each, "help": " ".join(each["help"].split())}
                )
                for each in parameters
            ]
            lines.append("")
        for law in ("order_free", "base_if_unmoved", "single_expert", "equal_experts"):
            if sentence := getattr(cls.laws, law):
                lines += [f"Not {law.replace('_', ' ')}: {sentence}", ""]
    return "\n".join(lines)


def command_page() -> str:
    """Return the page of all commands."""
    lines = ["# Commands", "", "Made from the code by `make docs`.", ""]
    for command in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            run_command([command, "--help"])
        body = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
        lines += [f"## {command}", "", "```text", body, "```", ""]
    return "\n".join(lines)


def main() -> int:
    """Write or compare the pages."""
    os.environ["COLUMNS"] = "100"  # help is wrapped to the terminal
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check = parser.parse_args().check
    stale = 0
    for name, text in {"methods.md": methods_page(), "commands.md": command_page()}.items():
        path = REFERENCE / name
        if check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                print(f"{path} is out of date; run `make docs`.", file=sys.stderr)
                stale = 1
        else:
            REFERENCE.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path)
    return stale


if __name__ == "__main__":
    sys.exit(main())
