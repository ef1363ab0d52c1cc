"""Sphinx: this folder as a site that needs no network, to build or to read. `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from generate import gains, write_reference  # noqa: E402 - found beside this file

project = "mergewell"
author = "The mergewell authors"
html_title = "mergewell"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "math_ml"]
exclude_patterns = ["_build", "notebooks"]
myst_enable_extensions = ["dollarmath", "substitution"]
myst_substitutions = {"gain": gains()}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
default_role = "code"
suppress_warnings = ["myst.header"]  # studies may begin at any depth
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "tango"
pygments_dark_style = "github-dark"
html_theme_options = {"navigation_with_keys": True}

write_reference(HERE / "reference" / "generated")
