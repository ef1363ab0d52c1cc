"""HTML: a template filled in as one file that holds its style and script and asks for nothing.

A content security policy with the hashes of our own style and script makes the browser keep that
promise, whatever a task or a model is called.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mergewell.report import numbers, svg

HERE = Path(__file__).parent


def render(
    template: str,
    values: Mapping[str, Any],
    *,
    sheets: Sequence[str] = ("page.css",),
    scripts: Sequence[str] = ("page.js",),
) -> str:
    """Return a template of this folder as one HTML text, every value escaped but for `Markup`.

    sheets, scripts: the files of this folder that it holds; nothing else may act in the page.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = numbers.percent
    environment.filters["fine_percent"] = numbers.fine_percent
    environment.filters["number"] = numbers.number
    environment.filters["fixed"] = numbers.fixed
    environment.filters["seconds"] = numbers.seconds
    style, script = (_joined(names) for names in (sheets, scripts))
    return environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        level_words=svg.LEVEL_WORDS,
        level_marks={level: Markup(_mark(shape)) for level, shape in svg.LEVEL_SHAPES.items()},
        listed=numbers.listed,
        counted=numbers.counted,
        percent_range=numbers.percent_range,
        **values,
    )


def _joined(names: Sequence[str]) -> str:
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


def _mark(shape: str) -> str:
    return f'<svg class="icon" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{shape}"/></svg>'


def _policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    scripted = f"script-src {source(script)}; " if script else ""
    return (
        f"default-src 'none'; style-src {source(style)}; {scripted}"
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
