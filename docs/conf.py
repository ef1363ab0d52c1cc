"""Sphinx: this folder as a site that needs no network, to build or to read. `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from generate import write_reference  # noqa: E402 - found beside this file

project = "mergewell"
author = "The mergewell authors"
html_title = "mergewell"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "math_ml"]
exclude_patterns = ["_build", "notebooks", "NOTE_TO*"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": "",
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7ab8f0", "color-brand-content": "#7ab8f0"},
}

write_reference(HERE / "reference" / "generated")
