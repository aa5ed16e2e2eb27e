"""Decides which of a visitor's several accounts a request is about.

The sign-in names all accounts of a visitor: a claim of the OpenID provider, or a header of the
sign-in proxy. Each request names one of them, in its URL or in its form, so tabs with different
accounts never act on each other's. Nothing else, such as the session, remembers a choice.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from starlette.requests import Request

from latchkey_console.identity import (
    ProxyHeader,
    Refused,
    Viewer,
    invalid_account_id,
)
from latchkey_console.settings import is_account_id

__all__ = ["ACCOUNTS_MAX", "NotChosen", "ProxyAccounts", "accounts_of", "choose", "listed"]

# A hundred ids such as UUIDs fit into the session's cookie. `openid` refuses a sign-in whose
# accounts do not fit.
ACCOUNTS_MAX: Final = 100


class NotChosen(Exception):
    """The visitor has several accounts, and the request does not name one of them."""


def accounts_of(claim: object, key: str | None) -> tuple[str, ...]:
    """Return the accounts in a claim: an array of texts, or with `key` of objects that have it.

    Raises Refused if there are none or too many, or if any is invalid.
    """
    if not isinstance(claim, list):
        raise invalid_account_id("The provider's claim is not a list of accounts.")
    ids = [entry.get(key) if isinstance(entry, Mapping) else None for entry in claim]
    return _checked(ids if key else claim, "The provider's list contains an invalid account ID.")


def listed(text: str) -> tuple[str, ...]:
    """Return the accounts in a header, separated by commas. Raises Refused, as `accounts_of`."""
    ids = [each.strip(" \t") for each in text.split(",")] if text.strip(" \t") else []
    return _checked(ids, "The sign-in proxy's list contains an invalid account ID.")


def choose(viewer: Viewer, wanted: str) -> Viewer:
    """Return the visitor with the account that the request names.

    Raises NotChosen, and Refused for an account that is not the visitor's.
    """
    if viewer.accounts is None:
        return viewer
    if wanted in viewer.accounts:
        return replace(viewer, account_id=wanted)
    if wanted:
        raise Refused(
            403,
            "This is not your account",
            "Nothing was changed. Your sign-in does not include the account of this page. It may "
            "have ended meanwhile.",
            action=("Choose an account", "/accounts"),
        )
    if len(viewer.accounts) > 1:
        raise NotChosen
    return replace(viewer, account_id=viewer.accounts[0])


class ProxyAccounts(ProxyHeader):
    """Trusts a sign-in proxy that sends all accounts of a visitor in one header."""

    def viewer(self, request: Request) -> Viewer:
        """Return the visitor with the accounts in the header. Raises Refused."""
        value = self.value(request, "The sign-in proxy sent several lists of accounts.")
        person = self.person(request)
        if not person:
            # An account does not say who acts, and the audit log must.
            raise self.nobody()
        return Viewer("", person=person, accounts=listed(value))


def _checked(ids: list[object] | list[str], mistake: str) -> tuple[str, ...]:
    """Return each account once. Raises Refused for the whole list if any account is invalid."""
    if not ids:
        raise Refused(
            403,
            "You do not have an account",
            "You are signed in, but you do not belong to any account. Ask your administrator to "
            "add you to one.",
        )
    if len(ids) > ACCOUNTS_MAX:
        raise Refused(
            403,
            "You have too many accounts",
            f"This page can offer at most {ACCOUNTS_MAX} accounts. Ask your administrator for a "
            "sign-in with fewer.",
        )
    valid = [each for each in ids if isinstance(each, str) and is_account_id(each)]
    if len(valid) < len(ids):
        raise invalid_account_id(mistake)
    return tuple(dict.fromkeys(valid))
