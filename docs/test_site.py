"""What stands in the repository beside the site is what the site's sources give."""

from notebook import OUT, notebook


def test_the_notebook_is_the_guide() -> None:
    assert OUT.read_text() == notebook(), "run `python docs/notebook.py`: the guide is newer"
