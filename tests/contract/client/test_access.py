"""The client library with a service that requires TLS and credentials."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import latchkey
import pytest
from latchkey import Access, AuditFilter, Client, Outcome, Scope, Verdict, Verifier
from latchkey_service.settings.settings import Settings

from tests.helpers.callers import (
    Identity,
    credential,
    policy_text,
    spiffe_identity,
    stranger,
    uri,
    write_server_files,
)
from tests.helpers.servers import fresh_database, make_settings, serving_as
from tests.helpers.waiting import WAIT_SECONDS, eventually


@dataclass(frozen=True)
class Guarded:
    """A service with a policy: the address for plaintext and the one that wants certificates."""

    plaintext: str
    encrypted: str
    folder: Path

    def access(self, who: Identity | str | None = None) -> Access:
        """Return an Access with TLS, and with a certificate if `who` is an identity."""
        ca = self.folder / "clients.pem"
        if who is None:
            return Access(tls_ca=ca)
        identity = spiffe_identity(uri(who)) if isinstance(who, str) else who
        certificate, key = self.folder / "own.pem", self.folder / "own.key"
        certificate.write_bytes(identity.certificate)
        key.write_bytes(identity.key)
        return Access(tls_ca=ca, tls_certificate=certificate, tls_key=key)


@pytest.fixture(scope="module")
async def guarded(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path
) -> AsyncIterator[Guarded]:
    folder = scratch / "guarded"
    folder.mkdir()
    policy = folder / "policy.toml"
    policy.write_text(policy_text())
    settings: Settings = make_settings(
        await fresh_database(postgres_url), pepper_file, "native"
    ).model_copy(
        update={"policy": policy, "tls_listen": "127.0.0.1:0", **write_server_files(folder)}
    )
    async with serving_as(settings) as server:
        assert server.tls_address is not None
        yield Guarded(server.address, server.tls_address, folder)


@pytest.mark.parametrize("how", ["certificate", "credential"])
async def test_access_works_for_the_whole_library(guarded: Guarded, how: str) -> None:
    """An authorized client can manage tokens, verify from its cache and read the audit log, by
    certificate or by credential."""

    def client(name: str) -> Client:
        if how == "certificate":
            return Client(guarded.encrypted, access=guarded.access(name))
        return Client(guarded.plaintext, access=Access(credential=credential(name)))

    async with client("manager") as manager, client("verifier") as asking:
        created = await manager.create("acme", f"by {how}", Scope.READ)
        async with Verifier(asking, timeout_seconds=WAIT_SECONDS) as verifier:
            await eventually(lambda: verifier.stats().watching, "it watches")

            async def answers_from_cache() -> bool:
                await verifier.verify(created.secret)
                return verifier.verify_nowait(created.secret) is not None

            await eventually(answers_from_cache, "it answers from the cache")
            await manager.delete("acme", created.token.id)
            assert (await verifier.verify(created.secret)).verdict is Verdict.DELETED
        with pytest.raises(latchkey.PermissionDenied) as caught:
            await asking.delete("acme", created.token.id)
        assert caught.value.reason == "METHOD_DENIED"
    async with client("operator") as operator:
        wanted = AuditFilter(token_id=created.token.id)

        async def denied() -> bool:
            page = await operator.audit_page(wanted)
            return any(entry.outcome is Outcome.DENIED for entry in page.entries)

        await eventually(denied, "the denial is in the audit log")
        first = await operator.audit_page(wanted, page_size=1)
        rest = await operator.audit_page(wanted, page_token=first.next_page_token)
        # Without the operator's own reading.
        entries = [e for e in (*first.entries, *rest.entries) if e.caller != "operator"]
        told = {(e.caller, e.method.rpartition("/")[2], e.outcome) for e in entries}
        assert told == {
            ("manager", "Create", Outcome.OK),
            ("manager", "Delete", Outcome.OK),
            ("verifier", "Delete", Outcome.DENIED),
        }
        assert (await operator.status()).verifiers


async def test_an_account_limited_verifier_asks_each_time(guarded: Guarded) -> None:
    """A verifier limited to one account gets no lease. It reports why and asks the service."""
    access = Access(credential=credential("acmes-verifier"))
    async with (
        Client(guarded.plaintext, access=Access(credential=credential("manager"))) as manager,
        Client(guarded.plaintext, access=access) as asking,
        Verifier(asking, timeout_seconds=WAIT_SECONDS) as verifier,
    ):
        created = await manager.create("acme", "asked each time", Scope.READ)
        other = await manager.create("globex", "another's", Scope.READ)
        assert (await verifier.verify(created.secret)).verdict is Verdict.VALID
        assert (await verifier.verify(other.secret)).verdict is Verdict.UNKNOWN
        await eventually(lambda: verifier.stats().fallback_reason, "it reports why")
        assert "limited to accounts" in str(verifier.stats().fallback_reason)
        assert verifier.verify_nowait(created.secret) is None


async def failure(target: str, access: Access) -> latchkey.LatchkeyError:
    async with Client(target, access=access, timeout_seconds=WAIT_SECONDS) as client:
        with pytest.raises(latchkey.LatchkeyError) as caught:
            await client.get("acme", "tok_0")
    return caught.value


async def test_connection_errors_name_their_cause(guarded: Guarded, scratch: Path) -> None:
    """The error distinguishes an untrusted service, a service without TLS, one that rejects the
    client's certificate, and one that is unreachable. It says what to check.
    """
    foreign = scratch / "foreign.pem"
    foreign.write_bytes(stranger("localhost").certificate)
    wrong_ca = await failure(guarded.encrypted, Access(tls_ca=foreign))
    assert wrong_ca.reason == "TLS_HANDSHAKE_FAILED"
    assert "LATCHKEY_TLS_CA" in str(wrong_ca)
    no_tls = await failure(guarded.plaintext, guarded.access("manager"))
    assert no_tls.reason == "TLS_HANDSHAKE_FAILED"
    assert "does not speak TLS" in str(no_tls)
    for access in (
        guarded.access(None),
        guarded.access(stranger("manager.internal")),
        guarded.access(spiffe_identity(uri("manager"), expired=True)),
        Access(),
    ):
        refused = await failure(guarded.encrypted, access)
        assert refused.reason == "CONNECTION_CLOSED", access
        assert "the client certificate may have expired" in str(refused)
    unknown = await failure(guarded.plaintext, Access(credential=credential("nobody")))
    assert isinstance(unknown, latchkey.Unauthenticated)
    assert unknown.reason == "CREDENTIAL_UNKNOWN"
    assert credential("nobody") not in str(unknown)
