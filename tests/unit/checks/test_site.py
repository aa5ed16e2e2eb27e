"""The checks of the documentation site find the faults that they are for."""

from pathlib import Path

import pytest

from tests.helpers.repository import ROOT
from tests.site import build, grpc_reference, links, pages, python_reference


def write(site: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = site / f"{name}.html"
        path.write_text(f"<html><body>{text}</body></html>", "utf-8")


def test_link_that_leads_nowhere(tmp_path: Path) -> None:
    """A link to a missing page or to a missing place on a page is found, and no other."""
    write(
        tmp_path,
        one='<a href="two.html#here">x</a><a href="three.html">x</a><a href="#gone">x</a>',
        two='<h2 id="here">x</h2><a href="one.html#gone">x</a><a href="https://example.com/">x</a>',
    )
    assert links.broken(tmp_path) == [
        "one.html: three.html",
        "one.html: #gone",
        "two.html: one.html#gone",
    ]


def test_page_that_loads_from_another_host(tmp_path: Path) -> None:
    """A script, a style sheet, a picture or a font from another host is found. A link that a reader
    may open is not."""
    write(
        tmp_path,
        one='<script src="https://cdn.example/x.js"></script><img src="//cdn.example/x.png">',
        two='<link rel="stylesheet" href="https://fonts.example/x"><a href="https://example.com">x</a>',
        three='<link rel="canonical" href="https://example.com/"><img src="x.png">',
    )
    (tmp_path / "x.css").write_text("@font-face { src: url(https://fonts.example/x.woff2) }")
    assert links.foreign(tmp_path) == [
        "one.html: https://cdn.example/x.js",
        "one.html: //cdn.example/x.png",
        "two.html: https://fonts.example/x",
        "x.css: https://fonts.example/x.woff2",
    ]


def test_link_to_a_missing_file_stops_the_build(tmp_path: Path) -> None:
    """A document that links to a file that does not exist has no page."""
    (tmp_path / "docs").mkdir()
    for name in pages.DOCUMENTS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# A document\n")
    (tmp_path / "docs/one.md").write_text("[two](two.md)\n")
    with pytest.raises(pages.BrokenLink, match=r"docs/one\.md links to two\.md"):
        pages.stage(tmp_path, tmp_path / "pages")


def test_links_lead_to_pages(tmp_path: Path) -> None:
    """Links of a document lead to the pages of documents and files, and to pictures."""
    source = tmp_path / "pages"
    pages.stage(ROOT, source)
    start = (source / "index.md").read_text("utf-8")
    assert "](coherence.md)" in start
    assert "](client-library.md#install)" in start
    assert "](files/LICENSE.md)" in start
    assert "](reference/grpc.md)" in start
    assert "](console.png)" in start
    assert (source / "console.png").read_bytes() == (ROOT / "docs/console.png").read_bytes()
    assert "](files/docs/envoy.yaml.md)" in (source / "errors.md").read_text("utf-8")


def test_page_outside_the_navigation(tmp_path: Path) -> None:
    """A page that the navigation lacks is found, and so is an entry without a page."""
    source = tmp_path / "docs"
    source.mkdir()
    (tmp_path / "zensical.toml").write_text(
        '[project]\nnav = [{ "A" = [{ "One" = "one.md" }, { "Two" = "two.md" }] }]\n'
    )
    for name in ("one.md", "three.md"):
        (source / name).write_text("# A page\n")
    assert build.unlisted(source) == ["three.md", "two.md"]


def test_reference_of_the_contract() -> None:
    """The page contains each method and message with its comment."""
    page = grpc_reference.page()
    assert "### TokenService.Delete\n\n[DeleteRequest](#deleterequest) → [DeleteResponse]" in page
    assert "stream of [WatchRequest](#watchrequest) → stream of [WatchResponse]" in page
    assert "| `account_id` = 1 | string | " in page
    assert page.count("\n### ") > 20


def test_reference_of_the_library() -> None:
    """The page contains each exported name once."""
    page = python_reference.page()
    for name in ("Client", "Verifier", "Token", "LatchkeyError"):
        assert page.count(f"::: latchkey.{name}\n") == 1
    assert "::: latchkey.guards.fastapi\n" in page
