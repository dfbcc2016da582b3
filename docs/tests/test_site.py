"""The site as Sphinx built it, for ``pytest --site FOLDER``: whole, without the network, and legible to everyone."""

from __future__ import annotations

import importlib
import itertools
import pydoc
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.util.inventory import InventoryFile

from xaffine.backends import Backend

PUBLIC = (
    "xaffine", "xaffine.backends", "xaffine.curvature", "xaffine.initializers", "xaffine.per_sample", "xaffine.testing",
    "xaffine.testing.bounds", "xaffine.testing.cases", "xaffine.testing.checks", "xaffine.testing.strategies",
)  # fmt: skip


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.headings: list[int] = []
        self.nameless: list[str] = []
        self._svg: str | None = None
        self._in_content = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        for name in ("href", "src", "srcset", "data", "poster"):
            if name in given and not (tag == "svg" or given[name].startswith("data:")):
                (self.links if (tag, name) == ("a", "href") else self.loaded).append(given[name])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self._in_content |= tag == "article"
        if tag == "img" and not given.get("alt"):
            self.nameless.append(self.get_starttag_text() or tag)
        if tag == "svg" and self._in_content and given.get("role") == "img":
            self._svg = self.get_starttag_text()
        elif tag == "svg" and self._in_content and given.get("aria-hidden") != "true":
            self.nameless.append(self.get_starttag_text() or tag)
        if tag == "title":
            self._svg = None

    def handle_endtag(self, tag: str) -> None:
        self._in_content &= tag != "article"
        if tag == "svg" and self._svg is not None:
            self.nameless.append(self._svg)
            self._svg = None


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("site")).resolve()


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    # The page of the search is made by a script as it is read.
    found = {path: Page(path) for path in site.rglob("*.html") if path != site / "search.html"}
    assert site / "index.html" in found
    return found


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for page in pages.values():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            there = target.is_file() and target.is_relative_to(site)
            if there and parts.fragment and target in pages:
                there = unquote(parts.fragment) in pages[target].ids
            if not there:
                dead.append(f"{page.path.relative_to(site)}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    strangers = [
        link for page in pages.values() for link in page.loaded if urlsplit(link).scheme or link.startswith("//")
    ]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        strangers += re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", text)
    assert strangers == []


def test_headings_begin_with_one_title_and_skip_no_level(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.headings.count(1) == 1, path
        assert page.headings[0] == 1, path
        steps = itertools.pairwise(page.headings)
        assert all(after <= before + 1 for before, after in steps), (path, page.headings)


def test_images_have_a_text_in_their_place(pages: dict[Path, Page]) -> None:
    assert [(path, tag) for path, page in pages.items() for tag in page.nameless] == []


@pytest.mark.parametrize("module", PUBLIC)
def test_reference_has_every_public_name(site: Path, module: str) -> None:
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = [name for kind, items in inventory.data.items() if kind.startswith("py:") for name in items]
    documented = {id(pydoc.locate(name)) for name in names}
    public = importlib.import_module(module)
    assert [name for name in public.__all__ if id(getattr(public, name)) not in documented] == []


def test_reference_has_everything_that_is_asked_of_a_library(site: Path) -> None:
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {name for kind, items in inventory.data.items() if kind.startswith("py:") for name in items}
    public = [name for name in dir(Backend) if not name.startswith("_")]
    assert [name for name in public if f"xaffine.backends.Backend.{name}" not in names] == []


def test_page_of_the_command_shows_every_subcommand(site: Path) -> None:
    text = (site / "reference" / "command.html").read_text(encoding="utf-8")
    help_text = text.partition("subcommands:")[2].partition("</div>")[0]
    subcommands = re.findall(r"^ {4}(\w+) {2,}\w", help_text, re.MULTILINE)
    assert subcommands
    for name in subcommands:
        assert f"usage: xaffine {name} " in text
