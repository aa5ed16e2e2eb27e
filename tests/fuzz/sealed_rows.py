"""Sealed rows that somebody changes in the database: none is trusted, except an unchanged one.

An input is a list of changes to a genuine row, each with a byte for the field, and the bytes of the
new value.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.seal import Sealer, SealGuard
from latchkey_service.tokens.verdict import Scope, SecretRecord, TokenRecord

from tests.fuzz.target import Finding, Target

PEPPERS = (Pepper(b"seal" * 8), Pepper(b"next" * 8))
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
TOKEN = TokenRecord(
    "tok_" + "0" * 25 + "1",
    "acme",
    "genuine",
    Scope.READ,
    MOMENT,
    MOMENT + timedelta(days=1),
    "abcd",
    allowed_networks=("10.0.0.0/8",),
    permissions=("read:all",),
)
SECRET = SecretRecord(b"\x01" * 32, PEPPERS[0].id, None, None, False, None)


@dataclass
class Row:
    """A row as the database returns it."""

    token: TokenRecord
    secret: SecretRecord


class SealedRows(Target):
    """A guard that knows that every row is sealed."""

    length_max = 256

    def __init__(self) -> None:
        self._sealer = Sealer(PEPPERS)
        seal = self._sealer.seal(TOKEN, SECRET)
        assert seal is not None, "the pepper is known"
        self._genuine = SECRET._replace(seal=seal)
        self._guard = SealGuard(Keyring(list(PEPPERS)), lambda: 0.0)
        self._guard.learn({p.id: self._sealer.all_sealed(p.id) for p in PEPPERS})

    def seeds(self) -> Iterable[bytes]:
        yield b""
        for field in range(14):
            yield bytes([field, 1, 7])
        yield bytes([3, 1, 1, 12, 2, 0, 0])

    def one(self, data: bytes) -> None:
        row = Row(TOKEN, self._genuine)
        while len(data) >= 2:
            field, length = data[0] % 14, data[1]
            value, data = data[2 : 2 + length], data[2 + length :]
            _change(row, field, value)
        trusted = self._guard.trusts(row.token, row.secret)
        unchanged = _deciding(row) == _deciding(Row(TOKEN, self._genuine))
        if trusted != unchanged:
            raise Finding(f"{'trusted' if trusted else 'refused'}: {row}")


def _change(row: Row, field: int, value: bytes) -> None:
    """Set a field to a value."""
    text = value.decode("utf-8", "surrogatepass" if value.isascii() else "replace")
    number = int.from_bytes(value[:4], "big")
    moment = None if not value else MOMENT + timedelta(microseconds=number)
    texts = tuple(text.split(",")) if text else ()
    token: dict[int, tuple[str, Any]] = {
        0: ("id", text),
        1: ("account_id", text),
        2: ("expire_time", moment),
        3: ("scope", Scope(number % 2 + 1)),
        4: ("disable_time", moment),
        5: ("allowed_networks", texts),
        6: ("permissions", texts),
        # No verdict depends on these.
        7: ("name", text),
        8: ("description", text),
    }
    if field in token:
        row.token = row.token._replace(**dict([token[field]]))
        return
    secret: dict[int, tuple[str, Any]] = {
        9: ("digest", value),
        10: ("expire_time", moment),
        11: ("pepper_id", PEPPERS[number % 2].id if len(value) % 2 else text),
        12: ("seal", value or None),
        13: ("ordinal", number),
    }
    row.secret = row.secret._replace(**dict([secret[field]]))


def _deciding(row: Row) -> tuple[Any, ...]:
    """Return everything on which a verdict depends, and the seal."""
    token, secret = row.token, row.secret
    return (
        token.id,
        token.account_id,
        token.scope,
        token.expire_time,
        token.disable_time is not None,
        token.allowed_networks,
        token.permissions,
        secret,
    )


TARGET = SealedRows
