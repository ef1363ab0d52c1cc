"""Docstrings as Markdown: facts by their label, and formulas with Greek letters and real indices.

Docstrings write formulas as people type them (`theta_k`, `sum_k`, `M_k'`, `||x||^2`), which the
terminal shows as it is; here the same text becomes HTML, token by token, and never another formula.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

LETTERS = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa", "lambda",
    "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega", "Delta", "Sigma",
    "Theta",
)  # fmt: skip
GREEK = {name: html.unescape(f"&{name};") for name in LETTERS}
LABELS = re.compile(r"(Papers?|Departures|Source|Raises|Shapes): ?")
SIGNS = {"<=": "≤", ">=": "≥", "!=": "≠", "||": "‖", "->": "→"}
INDEX = r"(?:[A-Za-z0-9]+|\{[^}]*\})"
TOKEN = re.compile(
    r"(?P<code>`[^`]+`)"
    r"|(?P<address>\barXiv:[\w./]+)"
    rf"|(?P<name>(?<![A-Za-z]')\b[A-Za-z]+)(?P<low>_{INDEX})?(?P<turned>'(?![A-Za-z]))?(?P<high>\^-?[A-Za-z0-9]+(?:_[a-z]+)?)?"
    r"|(?P<closed>\|\||[)\]|])(?P<power>\^(?:-?[A-Za-z0-9]+|\+)|'(?![A-Za-z]))"
    r"|(?P<sign><=|>=|!=|\|\||->)"
    r"|(?P<minus>(?<=\s)-(?=\s))|(?P<times>(?<=\s)\*(?=\s))"
)


def paragraphs(text: str) -> Iterator[str]:
    """Yield a docstring as Markdown, block by block."""
    for block in text.split("\n\n"):
        whole = re.sub(r"\n(?=[A-Z][a-z]+: )", "\n\n", block)
        for part in whole.split("\n\n"):
            words = " ".join(part.split())
            if label := LABELS.match(part):
                rest = words[label.end() :] if words.startswith(label[0]) else words
                yield f"**{label[1]}.** {escaped(rest[:1].upper() + rest[1:])}"
            elif "\n  " in part:
                yield f"```text\n{part}\n```"
            elif " = " in part:
                yield f'<p class="formula">{typeset(words)}</p>'
            else:
                yield escaped(words)
            yield ""


def typeset(text: str) -> str:
    """Return a formula and the words around it as HTML."""
    made: list[str] = []
    end = 0
    for found in TOKEN.finditer(text):
        made += [html.escape(text[end : found.start()], quote=False), _token(found, text)]
        end = found.end()
    return "".join([*made, html.escape(text[end:], quote=False)])


def _token(found: re.Match[str], text: str) -> str:
    if code := found["code"]:
        return f"<code>{html.escape(code[1:-1])}</code>"
    if found["sign"]:
        return SIGNS[found["sign"]]
    if found["minus"] or found["times"]:
        return "−" if found["minus"] else "·"
    if found["closed"]:
        power = found["power"][1:] or "⊤"
        return SIGNS.get(found["closed"], found["closed"]) + _script("sup", power)
    if found["name"] is None:
        return html.escape(found[0])
    name, low, turned, high = found["name"], found["low"], found["turned"], found["high"]
    marked = bool(low or high)
    if len(name) > 1 and name not in GREEK and not marked:
        return html.escape(found[0])  # a word, with its apostrophe if it has one
    if len(name) == 1 and not marked and not turned and _article(name, text, found.end()):
        return name
    shown = {"sum": "∑", "prod": "∏"}.get(name) or GREEK.get(name) or name
    italic = f"<var>{shown}</var>" if len(shown) == 1 and shown not in "∑∏" else shown
    tail = _script("sub", low[1:]) if low else ""
    tail += "<sup>⊤</sup>" if turned else ""
    return italic + tail + (_script("sup", high[1:]) if high else "")


def _article(letter: str, text: str, end: int) -> bool:
    """Return whether a single letter is the word a (or A), and no variable."""
    return letter in "aA" and bool(re.match(r"\s[a-z]{2,}", text[end:]))


def _script(tag: str, text: str) -> str:
    inner = text.strip("{}")
    shown = GREEK.get(inner, inner).replace("-", "−")
    return f"<{tag}>{html.escape(shown)}</{tag}>"


def escaped(text: str) -> str:
    """Return plain text that Markdown shows as it is; `names` in backquotes stay code."""
    pieces = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([\\*_<>\[\]{}#~$])(?<!\\\|)", r"\\\1", piece)
        for piece in pieces
    ).replace("\\\\|", "\\|")
