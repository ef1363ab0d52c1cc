"""The first-merge guide as a notebook: `python docs/notebook.py` writes it into docs/notebooks.

One source: words become text cells, Python blocks code cells, console blocks `%%bash` cells, and a
YAML block a cell that writes its file. The guide's own blocks are what is run in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
GUIDE = HERE / "guides" / "first_merge.md"
OUT = HERE / "notebooks" / "first_merge.ipynb"
BEFORE = "%pip install -q 'mergewell[all]'  # or, in a clone: %pip install -q -e '.[all]'"


def notebook() -> str:
    """Return the notebook as it is written."""
    cells = [*_cells(GUIDE.read_text())]
    cells.insert(1, new_code_cell(BEFORE))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the same bytes every time
    made = new_notebook(cells=cells)
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def _cells(text: str) -> Iterator[nbformat.NotebookNode]:
    pieces = re.split(r"^```(\w+)\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)
    for place in range(0, len(pieces), 3):
        if words := pieces[place].strip():
            yield new_markdown_cell(_linked(words))
        if place + 2 < len(pieces):
            yield new_code_cell(_code(pieces[place + 1], pieces[place + 2]))


def _code(language: str, body: str) -> str:
    if language == "console":
        whole = body.replace("\\\n", "\\\n$ ")
        return "\n".join(["%%bash", *(li[2:] for li in whole.splitlines() if li.startswith("$ "))])
    if language == "yaml":
        name, _, rest = body.partition("\n")
        return f"%%writefile {name[2:]}\n{rest.rstrip()}"
    return body.rstrip()


def _linked(words: str) -> str:
    """Return text whose links to other pages are their names alone: a notebook stands by itself."""
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", words)


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(notebook())
