"""Reads or generates a host's peppers and registers them with the database: its first step.

Does not own the rules (`fleet.py`), the file (`pepper_file.py`) or the SQL (`token_store.py`). Only
one host at a time registers new peppers, so of two new hosts on an empty database only one
generates a key.
"""

import asyncio
import contextlib
from pathlib import Path

from latchkey_service.secret_format import Keyring
from latchkey_service.tokens import fleet, pepper_file
from latchkey_service.tokens.pepper_file import (
    Draft,
    PepperFileError,
    PepperFileExists,
    PepperFileMissing,
)
from latchkey_service.tokens.token_store import TokenStore

__all__ = ["enrol"]


async def enrol(store: TokenStore, path: Path, *, named: bool, shared: bool) -> Keyring:
    """Return the peppers in `path` after registering all of them with the database.

    If the file is missing, one new key is generated, unless the setting names the file (`named`):
    a wrong path must not start a new set of keys. On a database that other hosts may use
    (`shared`), a key is generated only if the database knows none. Raises PepperFileError, which
    says what to do, and StoreUnavailable.
    """
    with contextlib.suppress(PepperFileMissing):
        return await _enrol_file(store, path, generated=shared and not named)
    if named:
        raise PepperFileMissing(path)
    if shared:
        known = await store.known_peppers()
        # A service with the same data directory may have generated a key since. Its file is in
        # place before the database knows the key.
        if not await asyncio.to_thread(path.exists):
            _raise_if(fleet.refusal(path, [], known, generated=True, new=True))
    draft = await asyncio.to_thread(Draft, path)
    try:
        await _enrol_draft(store, draft, generated=shared)
    except PepperFileExists:
        # Another service with this data directory generated one meanwhile.
        return await _enrol_file(store, path, generated=shared)
    finally:
        draft.discard()
    return draft.keyring


async def _enrol_file(store: TokenStore, path: Path, *, generated: bool) -> Keyring:
    keyring = await asyncio.to_thread(pepper_file.load, path)
    ids = [pepper.id for pepper in keyring.peppers]

    def check(known: list[fleet.KnownPepper]) -> None:
        _raise_if(fleet.refusal(path, ids, known, generated=generated, new=False))

    known = await store.known_peppers()
    check(known)
    # An ordinary restart ends here, without waiting for other hosts.
    if not {pepper.id for pepper in known}.issuperset(ids):
        # All of them: a key that this host only reads may become the newest on another host first.
        await store.enrol_peppers(ids, check)
    return keyring


async def _enrol_draft(store: TokenStore, draft: Draft, *, generated: bool) -> None:
    """Register a new key and put its file in place, or do neither.

    The file comes before the commit. If the process dies in between, its next start finds a file
    whose key the database does not know, and is refused if another host has generated one since.
    In the other order the database would expect a key that exists nowhere, and refuse every host.
    """
    ids = [pepper.id for pepper in draft.keyring.peppers]

    def check(known: list[fleet.KnownPepper]) -> None:
        # First: a service with the same data directory may have made both the file and the row.
        draft.check_vacant()
        try:
            _raise_if(fleet.refusal(draft.path, ids, known, generated=generated, new=True))
        except PepperFileError:
            # It is in place if this is a second attempt, and another host came first after all.
            draft.withdraw()
            raise
        draft.put_in_place()

    await store.enrol_peppers(ids, check)


def _raise_if(reason: str | None) -> None:
    if reason is not None:
        raise PepperFileError(reason)
