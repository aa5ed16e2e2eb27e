"""Files of tokens to import: what they may contain, and where their errors are."""

import base64
import contextlib
import hashlib
import io
import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey import FieldViolation, ImportOutcome, ImportResult
from latchkey_cli import importing
from latchkey_cli.import_file import (
    BYTES_MAX,
    COLUMNS,
    ROWS_MAX,
    FileError,
    FileRow,
    RowError,
    batches,
    read,
)
from latchkey_cli.times import Expiry

HASH = hashlib.sha256(b"some key").digest()
HEX = HASH.hex()
NO_DEFAULTS: dict[str, Any] = {"account": None, "scope": None, "expiry": Expiry(), "labels": {}}


def rows(text: str, *, lines_of_json: bool = False) -> list[FileRow | RowError]:
    return list(read(io.StringIO(text, newline=""), lines_of_json=lines_of_json))


def good(text: str, *, lines_of_json: bool = False) -> FileRow:
    (row,) = rows(text, lines_of_json=lines_of_json)
    assert isinstance(row, FileRow), row
    return row


@pytest.mark.parametrize(
    "text",
    [
        HEX,
        HEX.upper(),
        base64.b64encode(HASH).decode(),
        base64.urlsafe_b64encode(HASH).decode(),
        base64.b64encode(HASH).decode().rstrip("="),
        base64.urlsafe_b64encode(HASH).decode().rstrip("="),
    ],
)
def test_hashes(text: str) -> None:
    """Hexadecimal digits and both alphabets of base64 are read, with or without padding."""
    assert good(f"hash\n{text}\n").secret_sha256 == HASH
    assert good(json.dumps({"hash": text}), lines_of_json=True).secret_sha256 == HASH


@given(st.binary(min_size=32, max_size=32))
def test_each_hash_is_read_back(digest: bytes) -> None:
    """No hash is mistaken for another, in any of its forms."""
    for text in (digest.hex(), base64.urlsafe_b64encode(digest).decode().rstrip("=")):
        assert good(f"hash\n{text}\n").secret_sha256 == digest


def test_all_columns_of_csv() -> None:
    """Each column is read. Empty cells count as absent, quoted cells may have line breaks, and a
    byte order mark or white space in the header does not matter."""
    row = good(
        "hash, account,name,scope,expires,created,hint,description,networks,permissions,rate,"
        "enabled,label.team,label.empty\r\n"
        f'{HEX},acme,ci,READ,2030-01-31 18:00:00+00,2026-01-31T18:00:00Z,sk_…abcd,"a\nb",'
        '"192.0.2.0/24, 2001:db8::/32",orders:read orders:write,100/minute,f,data,\r\n'
    )
    assert row == FileRow(
        2,
        HASH,
        "acme",
        "ci",
        "read",
        datetime(2030, 1, 31, 18, tzinfo=UTC),
        datetime(2026, 1, 31, 18, tzinfo=UTC),
        "sk_…abcd",
        "a\nb",
        ("192.0.2.0/24", "2001:db8::/32"),
        ("orders:read", "orders:write"),
        "100/minute",
        enabled=False,
        labels={"team": "data"},
    )
    bare = good(f"hash,name\n{HEX},\n")
    assert (bare.account, bare.name, bare.scope, bare.expires) == (None, None, None, None)
    assert bare.enabled


def test_help_lists_all_columns() -> None:
    """The command's help names each column that a file may have."""
    text = re.sub(r"\s+", " ", importing.import_tokens.__doc__ or "")
    listed = re.search(r"column 'hash'. Other columns: (.*), and label.NAME", text)
    assert listed is not None
    assert {"hash", *listed[1].split(", ")} == set(COLUMNS)


def test_json_lines() -> None:
    """Values have their JSON types. Labels are an object, or columns as in CSV."""
    document = {
        "hash": HEX,
        "networks": ["192.0.2.1/32"],
        "permissions": [],
        "enabled": False,
        "expires": None,
        "labels": {"team": "data", "plan": 3},
        "label.more": "x",
    }
    row = good("\n" + json.dumps(document) + "\n\n", lines_of_json=True)
    assert (row.line, row.networks, row.enabled) == (2, ("192.0.2.1/32",), False)
    assert row.labels == {"team": "data", "plan": "3", "more": "x"}


def test_wrong_rows_do_not_stop_the_others() -> None:
    """Each error states the line on which the row begins, and the column."""
    found = rows(
        f"hash,scope,expires,enabled\n{HEX},,,\n,,,\nsk_live_x,,,\n{HEX},admin,,\n"
        f'{HEX},,2030-01-01,\n{HEX},,,maybe\n{HEX},,\n"{HEX}\n",,,\n{HEX},,,\n'
    )
    places = [(e.line, e.column) if isinstance(e, RowError) else e.line for e in found]
    assert places == [
        *(2, (3, "hash"), (4, "hash"), (5, "scope"), (6, "expires"), (7, "enabled")),
        *((8, ""), 9, 11),
    ]
    found = rows(
        f'{{"hash": "{HEX}"}}\n[]\n{{\n{{"hash": 1}}\n{{"key": "{HEX}"}}\n'
        f'{{"hash": "{HEX}", "name": 1}}\n{{"hash": "{HEX}", "labels": []}}\n',
        lines_of_json=True,
    )
    assert [e.line for e in found] == list(range(1, 8))
    assert [e.column for e in found if isinstance(e, RowError)] == [
        *("", "", "hash", "", "name", "labels"),
    ]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        # 32 bytes have two spare bits in base64, and these are not 0.
        ("hash", base64.b64encode(HASH).decode()[:-2] + "/=", "is not a SHA-256 hash"),
        ("label.team", ["a"], "must be text"),
        ("networks", 7, "must be texts"),
        ("permissions", ["orders:read", 7], "must be texts"),
        ("enabled", "perhaps", "must be true or false"),
        ("expires", "9999-12-31T23:59:59-23:59", "is too far away"),
    ],
)
def test_wrong_values_are_named(column: str, value: object, problem: str) -> None:
    """A wrong value is refused with its column and what is expected."""
    (error,) = rows(json.dumps({"hash": HEX, column: value}), lines_of_json=True)
    assert isinstance(error, RowError)
    assert error.column == column
    assert problem in error.problem


def test_line_that_is_too_long_ends_the_file() -> None:
    """A line longer than any row is not read to its end."""
    with pytest.raises(FileError, match="longer than any row"):
        rows(" " * 2**20 + "{}", lines_of_json=True)


@pytest.mark.parametrize(
    ("columns", "defaults", "column"),
    [
        ({"scope": "read"}, {}, "account"),
        ({"account": "acme"}, {}, "scope"),
        ({"account": "acme", "scope": "read", "rate": "often"}, {}, "rate"),
    ],
)
def test_rows_without_what_a_token_needs(
    columns: dict[str, str], defaults: dict[str, str], column: str
) -> None:
    """A row needs an account and a scope, its own or the command's, and a rate that can be read."""
    row = good(json.dumps({"hash": HEX, **columns}), lines_of_json=True)
    made = importing._token(row, importing._Defaults(**NO_DEFAULTS | defaults))
    assert isinstance(made, RowError)
    assert made.column == column


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            ImportResult(outcome=ImportOutcome.NAME_TAKEN),
            "2: name: a live token of the account has this name",
        ),
        (
            ImportResult(outcome=ImportOutcome.OTHER_ACCOUNT),
            "2: hash: a token of another account has",
        ),
        (
            ImportResult(outcome=ImportOutcome.UNSPECIFIED),
            "2: Latchkey did not import it (UNSPECIFIED)",
        ),
        (
            ImportResult(
                outcome=ImportOutcome.INVALID,
                field_violations=(
                    FieldViolation("allowed_networks[1]", "is not a network"),
                    FieldViolation("name", "is empty"),
                ),
            ),
            "2: networks[1]: is not a network; name: is empty",
        ),
    ],
)
def test_each_refusal_is_explained(
    capsys: pytest.CaptureFixture[str], result: ImportResult, text: str
) -> None:
    """A row that the service refuses is one refusal, with its line, the file's columns and all
    reasons."""
    progress = importing._Progress("keys.csv", dry_run=False, as_json=False)
    importing._refuse(2, result, progress)
    assert progress.counts["refused"] == 1
    assert f"keys.csv:{text}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["key", "secret", "token", "API_KEY", "apikey"])
def test_plain_secrets_are_refused(name: str) -> None:
    """A column of secrets in plain text is refused for the whole file. The message says what to do
    and quotes no value. A value that is not a hash is refused as well."""
    secret = "sk_live_4eC39HqLyjWDarjtT1zdp7dc"
    with pytest.raises(FileError, match="imports only hashes") as raised:
        rows(f"{name},scope\n{secret},read\n")
    assert secret not in str(raised.value)
    (error,) = rows(f"hash,scope\n{secret},read\n")
    assert isinstance(error, RowError)
    assert "hash it first" in error.problem
    assert secret not in error.problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("name\nx\n", "no column 'hash'"),
        ("hash,hash\n", "a column twice"),
        ("hash,nmae\n", "unknown column 'nmae'; the columns are hash, account"),
        ("hash,\x1b[2J\n", "unknown column that cannot be shown"),
        ("hash,label.\n", "unknown column"),
        (f'hash\n"{HEX}', "is not CSV"),
        (f'hash\n"{HEX}"x\n', "is not CSV"),
    ],
)
def test_files_that_cannot_be_read(text: str, problem: str) -> None:
    """The header must name known columns, each once, and quotes must be closed."""
    with pytest.raises(FileError, match=problem.replace("(", r"\(")):
        rows(text)


def test_not_utf_8() -> None:
    """A file in another encoding is refused as such."""
    file = io.TextIOWrapper(io.BytesIO(b"hash,name\n" + HEX.encode() + b",caf\xe9\n"), "utf-8")
    with pytest.raises(FileError, match="not UTF-8"):
        list(read(file, lines_of_json=False))


@given(st.text(max_size=300), st.booleans())
def test_any_text_is_read_or_refused(text: str, lines_of_json: bool) -> None:
    """Whatever a file contains, reading ends with rows or with a FileError."""
    whole = text if lines_of_json else f"hash\n{text}"
    with contextlib.suppress(FileError):
        assert all(row.line > 0 for row in rows(whole, lines_of_json=lines_of_json))


def test_batches_fit_into_a_call() -> None:
    """No batch has more rows or bytes than a call takes, and none is lost or reordered."""
    sizes = [BYTES_MAX // 2, BYTES_MAX // 2, 1, BYTES_MAX, *([1] * (2 * ROWS_MAX))]
    made = list(batches(iter(sizes), lambda size: size))
    assert [size for batch in made for size in batch] == sizes
    assert [len(batch) for batch in made] == [2, 1, 1, ROWS_MAX, ROWS_MAX]
