"""Say what is wrong with the built site: broken links, and anything asked of the network.

    python docs/site_check.py docs/_build/html

Links inside the site must lead to a file, and with an anchor to an element of that page. Assets
(scripts, styles, images, fonts) must lie in the site. External links are looked at, not opened.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ASSETS = {
    "script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src",
    "embed": "src", "object": "data", "image": "href", "use": "href",
}  # fmt: skip
LOADED = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch"}
IN_STYLES = re.compile(r"""(?:url\(\s*|@import\s+)['"]?((?:https?:)?//[^'")\s]+)""", re.IGNORECASE)


class Page(HTMLParser):
    """The anchors, links and assets of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element is called, where it leads and what it loads."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and LOADED & set(given.get("rel", "").split()):
            self.assets.append(given.get("href", ""))
        elif ASSETS.get(tag, "") in given:
            self.assets.append(given[ASSETS[tag]])
        self.assets += [part.split()[0] for part in given.get("srcset", "").split(",") if part]
        self.assets += IN_STYLES.findall(given.get("style", ""))


def faults(site: Path) -> Iterator[str]:
    """Yield one sentence for each fault of a site."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} holds no page; build it first."
    for page in pages.values():
        where = page.path.relative_to(site)
        for address in page.assets:
            if outside(address):
                yield f"{where} loads {address} from the network."
            elif not address.startswith("data:") and target(page.path, address) is None:
                yield f"{where} loads {address}, which is not there."
        for address in page.links:
            if fault := link_fault(page, address, pages):
                yield f"{where} links to {address}, {fault}."
    for style in sorted(site.rglob("*.css")):
        for address in IN_STYLES.findall(style.read_text(encoding="utf-8")):
            yield f"{style.relative_to(site)} loads {address} from the network."


def link_fault(page: Page, address: str, pages: dict[Path, Page]) -> str:
    """Return what is wrong with a link, or nothing."""
    parts = urlsplit(address)
    if outside(address):
        return "" if parts.scheme in ("http", "https") and "." in parts.netloc else "no address"
    if parts.scheme:
        return "" if parts.scheme in ("mailto", "data") else "a scheme that no reader has"
    found = target(page.path, address)
    if found is None:
        return "which is not there"
    anchor = unquote(parts.fragment)
    if anchor and found in pages and anchor not in pages[found].anchors:
        return "an anchor that the page lacks"
    return ""


def outside(address: str) -> bool:
    """Return whether an address is on the network."""
    return address.startswith("//") or bool(urlsplit(address).netloc)


def target(page: Path, address: str) -> Path | None:
    """Return the file that an address of a page means, if there is one."""
    path = unquote(urlsplit(address).path)
    found = (page.parent / path if path else page).resolve()
    found = found / "index.html" if found.is_dir() else found
    return found if found.is_file() else None


def main(site: Path) -> int:
    """Print the faults; return 1 if there are any."""
    found = list(faults(site))
    print("\n".join(found) or f"{site}: every link leads somewhere, nothing asks the network.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
