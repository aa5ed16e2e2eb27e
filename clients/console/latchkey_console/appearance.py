"""How the page looks inside a product: its theme and its logo.

A theme is a style sheet from which only known custom properties are taken. So it can change
colours, fonts and corners, but cannot hide a warning, load anything from elsewhere, or break with a
later release.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import tinycss2

__all__ = ["THEME_PROPERTIES", "Logo", "read_logo", "read_theme"]

THEME_BYTES_MAX: Final = 16_384
LOGO_BYTES_MAX: Final = 131_072
# As console.css defines them. docs/console.md describes each.
COLOURS: Final = (
    *("ground", "face", "sunk", "line", "edge", "text", "soft"),
    *("blue", "blue-hover", "on-blue", "blue-soft", "red", "red-hover", "on-red", "red-soft"),
    *("amber", "amber-soft", "green", "green-soft", "shadow", "lifted", "veil"),
)
SHAPES: Final = ("font", "mono", "corner", "panel-corner")
THEME_PROPERTIES: Final = (*COLOURS, *SHAPES)
# Colours, lengths, shadows and names of fonts. No url(), var() or other reference.
_VALUE: Final = re.compile(r"[A-Za-z0-9 #%.,/()\"'_+*-]{1,200}")
_FUNCTIONS: Final = frozenset(
    {"rgb", "rgba", "hsl", "hsla", "hwb", "lab", "lch", "oklab", "oklch", "color", "color-mix"}
    | {"calc", "min", "max", "clamp"}
)
_SCHEME: Final = "color-scheme"
_DARK: Final = "(prefers-color-scheme:dark)"
_LOGOS: Final[Mapping[str, tuple[str, re.Pattern[bytes]]]] = {
    ".svg": ("svg", re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg[\s>]", re.DOTALL)),
    ".png": ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ".webp": ("webp", re.compile(rb"RIFF....WEBP", re.DOTALL)),
}


@dataclass(frozen=True, slots=True)
class Logo:
    """The picture in the header and on the browser's tab."""

    name: str
    """Its file name in URLs."""
    data: bytes


def read_logo(path: Path) -> Logo:
    """Return the logo in a file. Raises ValueError."""
    data = _read(path, LOGO_BYTES_MAX)
    kind, pattern = _LOGOS.get(path.suffix.lower(), ("", None))
    if pattern is None or pattern.match(data) is None:
        raise ValueError(f"{path} must be an SVG, PNG or WebP file, named .svg, .png or .webp")
    return Logo(f"logo.{kind}", data)


def read_theme(path: Path) -> str:
    """Return the style sheet with the properties of a theme. Raises ValueError.

    The file may contain `:root { --name: value; }`, and the same within
    `@media (prefers-color-scheme: dark)`. Colours outside of the query are those of the light page.
    With `color-scheme: light`, the page is never dark.
    """
    try:
        text = _read(path, THEME_BYTES_MAX).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None
    light: dict[str, str] = {}
    dark: dict[str, str] = {}
    for rule in tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True):
        if rule.type == "at-rule" and rule.lower_at_keyword == "media" and rule.content:
            condition = re.sub(r"\s+", "", tinycss2.serialize(rule.prelude)).lower()
            if condition != _DARK:
                raise _at(path, rule, "use no other media query than (prefers-color-scheme: dark)")
            for inner in tinycss2.parse_rule_list(
                rule.content, skip_comments=True, skip_whitespace=True
            ):
                dark |= _properties(path, inner)
        else:
            light |= _properties(path, rule)
    if not light and not dark:
        raise ValueError(f"{path} sets no property; write it as :root {{ --blue: #0a7; }}")
    if _SCHEME in light:
        return _block(_defaults() | light)
    shapes = {name: value for name, value in light.items() if name.removeprefix("--") in SHAPES}
    colours = {name: value for name, value in light.items() if name not in shapes}
    # Beside the theme's light colours, the page keeps its own dark ones.
    return (
        _block(shapes)
        + f"@media not (prefers-color-scheme: dark) {{\n{_block(colours)}}}\n"
        + f"@media (prefers-color-scheme: dark) {{\n{_block(dark)}}}\n"
    )


def _properties(path: Path, rule: Any) -> dict[str, str]:
    """Return the properties that a rule sets, by name."""
    selector = tinycss2.serialize(rule.prelude).strip() if rule.type == "qualified-rule" else ""
    if selector != ":root":
        raise _at(path, rule, "write only :root { … }, even in a media query")
    items: list[Any] = tinycss2.parse_declaration_list(
        rule.content, skip_comments=True, skip_whitespace=True
    )
    found = {}
    for item in items:
        name = item.name if item.type == "declaration" and not item.important else "this"
        value = tinycss2.serialize(item.value).strip() if name != "this" else ""
        if (name, value) == (_SCHEME, "light"):
            found[name] = value
        elif name.removeprefix("--") not in THEME_PROPERTIES or not name.startswith("--"):
            raise _at(path, item, f"{name} is not a property of the theme")
        elif _VALUE.fullmatch(value) is None or not _is_plain(item.value):
            raise _at(path, item, f"the value of {name} is not allowed")
        else:
            found[name] = value
    return found


def _defaults() -> dict[str, str]:
    """Return the page's own light colours."""
    text = (resources.files("latchkey_console") / "static/console.css").read_text("utf-8")
    rule: Any = tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)[0]
    items: list[Any] = tinycss2.parse_declaration_list(rule.content)
    return {
        item.name: tinycss2.serialize(item.value).strip()
        for item in items
        if item.type == "declaration" and item.name.removeprefix("--") in COLOURS
    }


def _is_plain(values: Iterable[Any]) -> bool:
    """Return whether values refer to nothing: neither to resources nor to other properties."""
    for value in values:
        if value.type in ("error", "url", "{} block", "[] block"):
            return False
        if value.type == "function" and (
            value.lower_name not in _FUNCTIONS or not _is_plain(value.arguments)
        ):
            return False
        if value.type == "() block" and not _is_plain(value.content):
            return False
    return True


def _block(properties: Mapping[str, str]) -> str:
    lines = "".join(f"  {name}: {value};\n" for name, value in properties.items())
    return f":root {{\n{lines}}}\n" if lines else ""


def _at(path: Path, node: Any, mistake: str) -> ValueError:
    return ValueError(f"{path}, line {node.source_line}: {mistake}")


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > bytes_max:
        raise ValueError(f"{path} is too large; use at most {bytes_max // 1_024} KiB")
    return data
