"""What people type into the fields that describe and restrict a token, in both forms. Pure.

Each function returns the value for the service. It raises ValueError with a text for the page.
"""

import re
import unicodedata
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Final

__all__ = [
    "RESTRICTION_FIELDS",
    "description_of",
    "labels_of",
    "labels_text",
    "networks_of",
    "permissions_of",
]

# The service's limits.
DESCRIPTION_LENGTH_MAX: Final = 256
NETWORKS_MAX: Final = 32
PERMISSIONS_MAX: Final = 64
LABELS_MAX: Final = 16
LABEL_KEY_LENGTH_MAX: Final = 63
LABEL_VALUE_LENGTH_MAX: Final = 255
# How much of a mistake an error repeats.
_REPEATED_MAX: Final = 64
_PERMISSION: Final = re.compile(r"[a-z0-9_.-]{1,31}:([a-z0-9_.-]{1,31}|\*)")
# A key may contain the sign that ends it, written as \=, and so a backslash is written as \\.
_LABEL: Final = re.compile(r"((?:\\[\\=]|[^=])*)=(.*)", re.DOTALL)
_HIDDEN: Final = frozenset({"Cc", "Cs"})
_CONTROL: Final = _HIDDEN | {"Zl", "Zp"}
# For each field of the service: the form field that shows its mistakes, and its name there.
RESTRICTION_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "description": ("description", "The description"),
    "allowed_networks": ("networks", "An allowed network"),
    "permissions": ("permissions", "A permission"),
    "labels": ("labels", "A label"),
}


def description_of(text: str) -> str:
    """Return the description as typed, without surrounding white space and carriage returns."""
    description = text.replace("\r\n", "\n").strip()
    if len(description) > DESCRIPTION_LENGTH_MAX:
        raise ValueError(
            f"This description has {len(description)} characters. "
            f"Use at most {DESCRIPTION_LENGTH_MAX}."
        )
    if any(unicodedata.category(c) in _HIDDEN and c != "\n" for c in description):
        raise ValueError("The description contains a control character. Remove it.")
    return description


def networks_of(text: str) -> list[str]:
    """Return the networks, which are separated by white space or commas."""
    networks = _words(text)
    if len(networks) > NETWORKS_MAX:
        raise ValueError(f"These are {len(networks)} networks. Use at most {NETWORKS_MAX}.")
    for network in networks:
        shown = network[:_REPEATED_MAX]
        try:
            wide = ip_network(network, strict=False)
        except ValueError:
            raise ValueError(
                f"“{shown}” is not a network. Write it as 192.0.2.0/24 or 2001:db8::/32."
            ) from None
        try:
            ip_network(network)
        except ValueError:
            raise ValueError(
                f"“{shown}” has bits beyond its prefix. Did you mean {wide}?"
            ) from None
    return networks


def permissions_of(text: str) -> list[str]:
    """Return the permissions, which are separated by white space or commas."""
    permissions = _words(text)
    if len(permissions) > PERMISSIONS_MAX:
        raise ValueError(
            f"These are {len(permissions)} permissions. Use at most {PERMISSIONS_MAX}."
        )
    for permission in permissions:
        if _PERMISSION.fullmatch(permission):
            continue
        mistake = f"“{permission[:_REPEATED_MAX]}” is not a permission."
        if _PERMISSION.fullmatch(permission.lower()):
            raise ValueError(f"{mistake} Did you mean {permission.lower()}?")
        raise ValueError(f"{mistake} Write it as orders:read or orders:*.")
    return permissions


def labels_text(labels: Mapping[str, str]) -> str:
    """Return labels as the form shows them: one on each line, sorted."""
    return "\n".join(f"{_escaped(key)}={value}" for key, value in sorted(labels.items()))


def labels_of(text: str, before: str = "") -> dict[str, str]:
    """Return the labels of the lines.

    White space around a name or a value is removed, except from lines that occur in `before`,
    which is the text that the form showed.
    """
    kept = set(_lines(before))
    labels: dict[str, str] = {}
    for line in _lines(text):
        match = _LABEL.fullmatch(line)
        key, value = match.groups() if match else ("", "")
        if line not in kept:
            key, value = key.strip(), value.strip()
        key = re.sub(r"\\([\\=])", r"\1", key)
        if not key:
            raise ValueError(
                f"“{line.strip()[:_REPEATED_MAX]}” is not a label. Write it as team=payments."
            )
        shown = key[:_REPEATED_MAX]
        if len(key) > LABEL_KEY_LENGTH_MAX:
            raise ValueError(
                f"The name “{shown}” has {len(key)} characters. Use at most {LABEL_KEY_LENGTH_MAX}."
            )
        if len(value) > LABEL_VALUE_LENGTH_MAX:
            raise ValueError(
                f"The value of “{shown}” has {len(value)} characters. "
                f"Use at most {LABEL_VALUE_LENGTH_MAX}."
            )
        if any(unicodedata.category(c) in _CONTROL for c in line):
            raise ValueError("A label contains a control character. Remove it.")
        if key in labels:
            raise ValueError(f"The label “{shown}” occurs twice. Keep one of them.")
        labels[key] = value
    if len(labels) > LABELS_MAX:
        raise ValueError(f"These are {len(labels)} labels. Use at most {LABELS_MAX}.")
    return labels


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _lines(text: str) -> list[str]:
    """Return the lines that are not blank, which end as browsers end them."""
    lines = text.replace("\r\n", "\n").split("\n")
    return [line for line in lines if line.strip()]


def _escaped(key: str) -> str:
    return key.replace("\\", "\\\\").replace("=", "\\=")
