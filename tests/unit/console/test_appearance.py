"""The theme and the logo: what is accepted, and what the page makes of it."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from latchkey_console.appearance import COLOURS, THEME_PROPERTIES, read_logo, read_theme

from tests.helpers.repository import ROOT
from tests.unit.console.scripted import Scripted, console

CSS = (resources.files("latchkey_console") / "static/console.css").read_text("utf-8")
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 20
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


def written(folder: Path, content: bytes | str, name: str = "theme.css") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_theme_has_colours_for_both_schemes(tmp_path: Path) -> None:
    """Light colours do not reach the dark page. Fonts and corners apply to both."""
    theme = read_theme(
        written(
            tmp_path,
            """/* Ours */
            :root { --blue: #0a7; --font: "Acme Sans", sans-serif; --corner: 0;
              --shadow: 0 1px 2px rgb(0 0 0 / 10%) }
            @media (prefers-color-scheme:dark) { :root { --blue: oklch(70% 0.1 200); } }""",
        )
    )
    shapes, light, dark = theme.split("@media ")
    assert '--font: "Acme Sans", sans-serif;' in shapes
    assert "--corner: 0;" in shapes
    assert light.startswith("not (prefers-color-scheme: dark) {")
    assert "--blue: #0a7;" in light
    assert "--shadow: 0 1px 2px rgb(0 0 0 / 10%);" in light
    assert dark.startswith("(prefers-color-scheme: dark) {")
    assert "--blue: oklch(70% 0.1 200);" in dark


def test_light_theme_sets_every_colour(tmp_path: Path) -> None:
    """With `color-scheme: light`, no dark colour is left."""
    theme = read_theme(written(tmp_path, ":root { color-scheme: light; --blue: #0a7 }"))
    assert "@media" not in theme
    assert "  color-scheme: light;\n" in theme
    found = dict(re.findall(r"^  --([a-z-]+): (.+);$", theme, re.MULTILINE))
    assert set(found) == set(COLOURS)
    assert (found["blue"], found["face"]) == ("#0a7", "#fff")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "sets no property"),
        (":root { --blue: url(https://evil.example/x) }", "the value of --blue is not allowed"),
        (":root { --blue: var(--text) }", "the value of --blue is not allowed"),
        (":root { --blue: calc(var(--x)) }", "the value of --blue is not allowed"),
        (":root { --font: image-set('a' 1x) }", "the value of --font is not allowed"),
        (":root { --blue: attr(x) }", "the value of --blue is not allowed"),
        (":root { --blue: {a:b} }", "the value of --blue is not allowed"),
        (":root { --blue: \\75rl(x) }", "the value of --blue is not allowed"),
        (":root { --blue: }", "the value of --blue is not allowed"),
        (f":root {{ --blue: {'a' * 300} }}", "the value of --blue is not allowed"),
        (":root { --blue: #0a7 !important }", "not a property of the theme"),
        (":root { --bleu: #0a7 }", "line 1: --bleu is not a property of the theme"),
        (":root { blue: #0a7 }", "blue is not a property of the theme"),
        (":root { display: none }", "display is not a property"),
        (":root { color-scheme: dark }", "color-scheme is not a property"),
        ("\n.note { --blue: #0a7 }", "line 2: write only :root"),
        ("#notice { display: none }", "write only :root"),
        ("@import 'https://evil.example/x.css';", "write only :root"),
        ("@font-face { src: url(x) }", "write only :root"),
        ("@media print { :root { --blue: #0a7 } }", "no other media query"),
        ("</style><script>", "write only :root"),
        (b"\xff\xfe", "not a text in UTF-8"),
        (":root {" + " " * 20_000 + "}", "too large; use at most 16 KiB"),
    ],
)
def test_anything_else_in_a_theme_is_refused(
    tmp_path: Path, content: bytes | str, words: str
) -> None:
    """A theme cannot hide anything, load anything, or refer to what may change."""
    with pytest.raises(ValueError, match=re.escape(words)):
        read_theme(written(tmp_path, content))


def test_properties_are_those_of_the_page_and_documented() -> None:
    """Each property exists in console.css, with a dark value if it is a colour, and in the docs."""
    light, dark = re.findall(r":root \{(.*?)\n\s*\}", CSS, re.DOTALL)[:2]
    assert set(re.findall(r"--([a-z-]+):", light)) == set(THEME_PROPERTIES)
    assert set(re.findall(r"--([a-z-]+):", dark)) == set(COLOURS)
    table = (ROOT / "docs/console.md").read_text("utf-8")
    for name in THEME_PROPERTIES:
        assert f"`--{name}`" in table, name


@pytest.mark.parametrize(
    ("name", "content", "served"),
    [
        ("logo.svg", SVG, "logo.svg"),
        ("Logo.SVG", b'<?xml version="1.0"?>\n<!-- ours -->\n' + SVG, "logo.svg"),
        ("acme.png", PNG, "logo.png"),
        ("acme.webp", b"RIFF\x10\0\0\0WEBPVP8 ", "logo.webp"),
    ],
)
def test_logo(tmp_path: Path, name: str, content: bytes, served: str) -> None:
    """A logo is served under a fixed name."""
    logo = read_logo(written(tmp_path, content, name))
    assert (logo.name, logo.data) == (served, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("logo.png", SVG),
        ("logo.svg", PNG),
        ("logo.svg", b"<html><svg>"),
        ("logo.html", SVG),
        ("logo.png", PNG + b"\0" * 140_000),
    ],
)
def test_logo_content_must_match_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    """A file whose content is not what its name says is refused."""
    with pytest.raises(ValueError, match=r"must be an SVG|too large"):
        read_logo(written(tmp_path, content, name))


def test_error_names_a_missing_file(tmp_path: Path) -> None:
    """The error names a file that is missing."""
    with pytest.raises(ValueError, match=r"cannot read .*none.svg"):
        read_logo(tmp_path / "none.svg")


async def test_page_has_theme_and_logo(tmp_path: Path) -> None:
    """The page links to both, under its own address, so that its content policy allows them."""
    options: dict[str, Any] = {
        "theme_css": written(tmp_path, ":root { --blue: #0a7 }"),
        "logo": written(tmp_path, PNG, "acme.png"),
        "product_name": "Acme",
    }
    async with console(Scripted(), **options) as browser:
        page = (await browser.get("/")).text
        theme = re.search(r'rel="stylesheet" href="(/static/\w+/theme\.css)"', page)
        logo = re.search(r'<a class="brand".*<img src="(/static/\w+/logo\.png)"', page)
        assert theme is not None
        assert logo is not None
        assert page.index("console.css") < page.index("theme.css")
        assert "--blue: #0a7;" in (await browser.get(theme[1])).text
        answer = await browser.get(logo[1])
        assert (answer.headers["content-type"], answer.content) == ("image/png", PNG)
    async with console(Scripted()) as browser:
        assert "theme.css" not in (await browser.get("/")).text
