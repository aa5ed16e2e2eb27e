"""Reads files of tokens to import: CSV with a header, or one JSON object a line.

Owns the columns, and the words for what is wrong with a row. Never quotes a value, because a column
may contain secrets by mistake. Does not import anything (`importing.py`).
"""

import base64
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TextIO

__all__ = ["COLUMNS", "FileError", "FileRow", "RowError", "read"]

COLUMNS: Final = (
    *("hash", "account", "name", "scope", "expires", "created", "hint", "description"),
    *("networks", "permissions", "rate", "enabled"),
)
LABEL: Final = "label."
# Names of columns that contain secrets in other systems' tables.
_PLAIN: Final = frozenset({"key", "secret", "token", "api_key", "apikey", "value", "plaintext"})
_HEX: Final = re.compile(r"[0-9A-Fa-f]{64}")
# 32 bytes, with or without padding, in either alphabet.
_BASE64: Final = re.compile(r"[0-9A-Za-z+/_-]{43}=?")
_TRUTH: Final = {
    **dict.fromkeys(("true", "t", "1", "yes"), True),
    **dict.fromkeys(("false", "f", "0", "no"), False),
}
# A line of the largest valid row: 64 permissions of 63 characters, 16 labels of 318, and the rest.
_LINE_CHARACTERS_MAX: Final = 64 * 1024


class FileError(Exception):
    """The file cannot be read any further. `line` is 0 if it concerns the whole file."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


@dataclass(frozen=True, slots=True)
class RowError:
    """What is wrong with a row. `column` is empty if it concerns the whole row."""

    line: int
    column: str
    problem: str


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row. Absent values are None, or empty."""

    line: int
    secret_sha256: bytes = field(repr=False)
    account: str | None
    name: str | None
    scope: str | None
    expires: datetime | None
    created: datetime | None
    hint: str
    description: str
    networks: tuple[str, ...]
    permissions: tuple[str, ...]
    rate: str | None
    enabled: bool
    labels: Mapping[str, str]


class _WrongValue(ValueError):
    """A value cannot be read. The text says what is expected."""


def read(file: TextIO, *, lines_of_json: bool) -> Iterator[FileRow | RowError]:
    """Yield each row, or what is wrong with it. Raises FileError."""
    try:
        for line, values in _json_lines(file) if lines_of_json else _csv_rows(file):
            yield values if isinstance(values, RowError) else _row(line, values)
    except UnicodeDecodeError:
        raise FileError(0, "is not UTF-8") from None


def _csv_rows(file: TextIO) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    reader = csv.reader(file, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            first, line = line, reader.line_num + 1
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_columns(header)
            elif not cells:
                continue
            elif len(cells) != len(header):
                problem = f"has {len(cells)} cells, and the header has {len(header)}"
                yield first, RowError(first, "", problem)
            else:
                yield first, dict(zip(header, cells, strict=True))
    except csv.Error:
        raise FileError(line, "is not CSV: check its quotes") from None
    if header is None:
        raise FileError(0, "is empty; its first line must name the columns")


def _json_lines(file: TextIO) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    number = 0
    while text := file.readline(_LINE_CHARACTERS_MAX):
        number += 1
        if len(text) == _LINE_CHARACTERS_MAX:
            raise FileError(number, "is longer than any row")
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            yield number, RowError(number, "", "is not a JSON object")
            continue
        if not isinstance(values, dict):
            yield number, RowError(number, "", "is not a JSON object")
            continue
        labels = values.pop("labels", None)
        if labels is not None and not isinstance(labels, dict):
            yield number, RowError(number, "labels", "must be an object")
            continue
        values |= {f"{LABEL}{key}": value for key, value in (labels or {}).items()}
        try:
            _check_columns(list(values))
        except FileError as error:
            yield number, RowError(number, "", str(error))
            continue
        yield number, values


def _check_columns(names: list[str]) -> None:
    """Raise FileError unless these are the columns of a file."""
    known = f"the columns are {', '.join(COLUMNS)}, and {LABEL}NAME"
    for name in names:
        if name in COLUMNS or (name.startswith(LABEL) and name != LABEL):
            continue
        if name.lower() in _PLAIN:
            raise FileError(
                1,
                f"has the column {name!r}, which looks like secrets in plain text. Latchkey "
                "imports only hashes: hash them where they are, and put the SHA-256 hash of "
                "each whole secret into the column 'hash'",
            )
        shown = repr(name) if re.fullmatch(r"[\w. -]{1,40}", name) else "that cannot be shown"
        raise FileError(1, f"has an unknown column {shown}; {known}")
    if "hash" not in names:
        raise FileError(1, f"has no column 'hash'; {known}")
    if len(set(names)) < len(names):
        raise FileError(1, "names a column twice")


def _row(line: int, values: Mapping[str, Any]) -> FileRow | RowError:
    made: dict[str, Any] = {}
    for column, parse in _PARSERS.items():
        value = values.get(column)
        try:
            made[column] = parse(value.strip() if isinstance(value, str) else value)
        except _WrongValue as error:
            return RowError(line, column, str(error))
    labels = {}
    for column, value in values.items():
        if column.startswith(LABEL) and value not in (None, ""):
            if not isinstance(value, str | int):
                return RowError(line, column, "must be text")
            labels[column.removeprefix(LABEL)] = str(value)
    made["secret_sha256"] = made.pop("hash")
    return FileRow(line, labels=labels, **made)


def _hash(value: Any) -> bytes:
    if not value:
        raise _WrongValue("is required")
    if isinstance(value, str) and _HEX.fullmatch(value):
        return bytes.fromhex(value)
    if isinstance(value, str) and _BASE64.fullmatch(value):
        text = value.rstrip("=").translate(_URL_SAFE) + "="
        decoded = base64.b64decode(text)
        # The last character of 32 bytes has two spare bits, which must be 0. b64decode ignores
        # them.
        if base64.b64encode(decoded).decode() == text:
            return decoded
    raise _WrongValue(
        "is not a SHA-256 hash in hexadecimal or base64. If it is the secret itself, hash it "
        "first: Latchkey imports no secrets in plain text"
    )


_URL_SAFE: Final = str.maketrans("-_", "+/")


def _text(value: Any) -> str | None:
    if value in (None, ""):
        return None
    if not isinstance(value, str):
        raise _WrongValue("must be text")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if value in (None, ""):
        return ()
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise _WrongValue("must be texts, separated by spaces, or a list of texts")


def _scope(value: Any) -> str | None:
    text = _text(value)
    if text is not None and text.lower() not in ("read", "write"):
        raise _WrongValue("must be read or write")
    return None if text is None else text.lower()


def _enabled(value: Any) -> bool:
    if value is None or value == "":
        return True
    if isinstance(value, bool):
        return value
    truth = _TRUTH.get(str(value).lower())
    if truth is None:
        raise _WrongValue("must be true or false")
    return truth


def _moment(value: Any) -> datetime | None:
    text = _text(value)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text.upper())
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise _WrongValue("must be a time with its zone, such as 2030-01-31T18:00:00Z")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise _WrongValue("is too far away") from None


def _blank(value: Any) -> str:
    return _text(value) or ""


_PARSERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "hash": _hash,
    "account": _text,
    "name": _text,
    "scope": _scope,
    "expires": _moment,
    "created": _moment,
    "hint": _blank,
    "description": _blank,
    "networks": _words,
    "permissions": _words,
    "rate": _text,
    "enabled": _enabled,
}


def batches(rows: Iterable[Any], size_of: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Yield rows in batches that the service takes."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        more = size_of(row)
        if batch and (len(batch) == ROWS_MAX or size + more > BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += more
    if batch:
        yield batch


# The service's maximum for one call, and a size that leaves room below its limit of 512 KiB.
ROWS_MAX: Final = 1_000
BYTES_MAX: Final = 400_000
