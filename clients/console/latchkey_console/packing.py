"""Packs tokens and receipts as JSON, for cookies. Pure.

Packs only the fields of a token that the page with its new secret shows.
"""

from datetime import datetime
from typing import Any

from latchkey import Receipt, Scope, Token, TokenSecret

__all__ = ["pack_receipt", "pack_token", "unpack_receipt", "unpack_token"]


def pack_token(token: Token) -> dict[str, Any]:
    """Return the token as JSON."""
    return {
        "id": token.id,
        "account": token.account_id,
        "name": token.name,
        "scope": token.scope.value,
        "create": _out(token.create_time),
        "expire": _out(token.expire_time),
        "hint": token.hint,
        "secrets": [
            [s.hint, _out(s.create_time), _out(s.expire_time), s.retire_on_first_use]
            for s in token.secrets
        ],
    }


def unpack_token(packed: dict[str, Any]) -> Token:
    """Return the token."""
    return Token(
        id=packed["id"],
        account_id=packed["account"],
        name=packed["name"],
        scope=Scope(packed["scope"]),
        create_time=datetime.fromisoformat(packed["create"]),
        expire_time=_in(packed["expire"]),
        hint=packed["hint"],
        secrets=tuple(
            TokenSecret(
                hint=hint,
                create_time=datetime.fromisoformat(created),
                expire_time=_in(expires),
                retire_on_first_use=retires,
            )
            for hint, created, expires, retires in packed["secrets"]
        ),
    )


def pack_receipt(receipt: Receipt | None) -> list[Any] | None:
    """Return the receipt as JSON."""
    if receipt is None:
        return None
    return [
        _out(receipt.commit_time),
        _out(receipt.effective_time),
        receipt.revision,
        receipt.verifiers_acknowledged,
        receipt.verifiers_outwaited,
        receipt.clients_acknowledged,
        receipt.clients_outwaited,
    ]


def unpack_receipt(packed: list[Any] | None) -> Receipt | None:
    """Return the receipt."""
    if packed is None:
        return None
    committed, effective, revision, verifiers, outwaited, clients, clients_outwaited = packed
    return Receipt(
        commit_time=datetime.fromisoformat(committed),
        effective_time=_in(effective),
        revision=revision,
        verifiers_acknowledged=verifiers,
        verifiers_outwaited=outwaited,
        clients_acknowledged=clients,
        clients_outwaited=clients_outwaited,
    )


def _out(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _in(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
