"""What stands in the repository beside the site is what the site's sources give."""

import runpy
from pathlib import Path


def test_the_notebook_is_the_guide() -> None:
    made = runpy.run_path(str(Path(__file__).parent / "notebook.py"))
    assert made["OUT"].read_text() == made["notebook"](), "run `python docs/notebook.py`"
