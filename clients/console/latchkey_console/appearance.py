"""How the page looks inside a product: its theme and its logo.

A theme is a style sheet from which only known custom properties are taken. So it can change
colours, fonts and corners, but cannot hide a warning, load anything from elsewhere, or break with a
later release.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tinycss2

__all__ = ["THEME_PROPERTIES", "Logo", "read_logo", "read_theme"]

THEME_BYTES_MAX: Final = 16_384
LOGO_BYTES_MAX: Final = 131_072
# As console.css defines them. docs/console.md describes each.
THEME_PROPERTIES: Final = (
    *("ground", "face", "sunk", "line", "edge", "text", "soft"),
    *("blue", "blue-hover", "on-blue", "blue-soft", "red", "red-hover", "on-red", "red-soft"),
    *("amber", "amber-soft", "green", "green-soft", "shadow", "lifted", "veil"),
    *("font", "mono", "corner", "panel-corner"),
)
# Colours, lengths, shadows and names of fonts. No url(), var() or other reference.
_VALUE: Final = re.compile(r"[A-Za-z0-9 #%.,/()\"'_+*-]{1,200}")
_FUNCTIONS: Final = frozenset(
    {"rgb", "rgba", "hsl", "hsla", "hwb", "lab", "lch", "oklab", "oklch", "color", "color-mix"}
    | {"calc", "min", "max", "clamp"}
)
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
    `@media (prefers-color-scheme: dark)`.
    """
    try:
        text = _read(path, THEME_BYTES_MAX).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None
    rules = tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)
    light: dict[str, str] = {}
    dark: dict[str, str] = {}
    for rule in rules:
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
    sheet = _block(light)
    # Otherwise the page would keep its own dark colours beside the theme's light ones.
    if dark:
        sheet += f"@media (prefers-color-scheme: dark) {{\n{_block(dark)}}}\n"
    return sheet


def _properties(path: Path, rule: Any) -> dict[str, str]:
    selector = tinycss2.serialize(rule.prelude).strip() if rule.type == "qualified-rule" else ""
    if selector != ":root":
        raise _at(path, rule, "write only :root { … }, also in a media query")
    found = {}
    items: list[Any] = tinycss2.parse_declaration_list(
        rule.content, skip_comments=True, skip_whitespace=True
    )
    for item in items:
        name = item.name.removeprefix("--") if item.type == "declaration" else ""
        if name not in THEME_PROPERTIES or item.important:
            shown = item.name if item.type == "declaration" else "this"
            raise _at(path, item, f"{shown} is not a property of the theme")
        value = tinycss2.serialize(item.value).strip()
        if _VALUE.fullmatch(value) is None or not _is_plain(item.value):
            raise _at(path, item, f"the value of {item.name} is not allowed")
        found[name] = value
    return found


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
    lines = "".join(f"  --{name}: {value};\n" for name, value in properties.items())
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
