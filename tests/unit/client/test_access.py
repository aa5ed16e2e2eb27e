"""Access checks TLS files and credentials, and reports every mistake before it connects."""

import time

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from latchkey import Access, AccessError, Client, Verifier
from latchkey import access as module
from latchkey.secret import Secret

from tests.helpers.callers import (
    ca_pem,
    credential,
    dns_identity,
    stranger,
)

CREDENTIAL = credential("shop")


@pytest.fixture
def files(tmp_path):
    """Good and bad files, by name."""
    mine, other = dns_identity("shop.internal"), stranger("other.internal")
    key = serialization.load_pem_private_key(mine.key, None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    contents = {
        "ca": ca_pem(),
        "certificate": mine.certificate,
        "key": mine.key,
        "other key": other.key,
        "encrypted key": encrypted,
        "nonsense": b"\x00\x01nonsense",
        "empty": b"",
        "commented": "# Főtanúsítvány\n".encode() + ca_pem() + b"\xff\n" + ca_pem(),
        "damaged": ca_pem().replace(b"MII", b"\xc3\xa9", 1),
        "broken": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "credential": CREDENTIAL.encode() + b"\n",
        "typo": CREDENTIAL[:-1].encode() + b"!\n",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in (*contents, "missing")}


def test_valid_access(files):
    """Accepts TLS, a client certificate and a credential, each alone and all together."""
    assert Access().channel_credentials is None
    assert Access().metadata() == ()
    for given_ in (
        {"tls_ca": files["ca"]},
        {"tls_ca": files["commented"]},
        {"tls_ca": module.SYSTEM},
        {"tls_certificate": files["certificate"], "tls_key": files["key"]},
        {"tls_ca": files["ca"], "tls_certificate": files["certificate"], "tls_key": files["key"]},
    ):
        assert Access(**given_).channel_credentials is not None
    sent = (("authorization", f"Bearer {CREDENTIAL}"),)
    for given_ in (
        {"credential": CREDENTIAL},
        {"credential": Secret(CREDENTIAL)},
        {"credential_file": files["credential"]},
    ):
        access = Access(**given_, tls_ca=files["ca"])
        assert access.metadata() == sent
        assert CREDENTIAL not in repr(access) + str(access)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"tls_ca": "missing"}, "tls_ca: .*: No such file"),
        ({"tls_ca": "nonsense"}, "tls_ca: .* is not a PEM file"),
        ({"tls_ca": "empty"}, "tls_ca: .* is not a PEM file"),
        ({"tls_ca": "key"}, "tls_ca: .* contains no certificate, but a "),
        ({"tls_ca": "broken"}, "tls_ca: .* contains no readable certificate"),
        ({"tls_ca": "damaged"}, "tls_ca: .* contains no readable certificate"),
        (
            {"tls_certificate": "certificate"},
            "belong together: give tls_key, too .*LATCHKEY_TLS_KEY",
        ),
        ({"tls_key": "key"}, "belong together: give tls_certificate"),
        ({"tls_certificate": "certificate", "tls_key": "missing"}, "tls_key: .*: No such file"),
        (
            {"tls_certificate": "certificate", "tls_key": "certificate"},
            "tls_key: .* no private key",
        ),
        ({"tls_certificate": "key", "tls_key": "key"}, "tls_certificate: .* no certificate"),
        ({"tls_certificate": "certificate", "tls_key": "other key"}, "does not belong to"),
        ({"tls_certificate": "certificate", "tls_key": "encrypted key"}, "is encrypted"),
        ({"tls_certificate": "broken", "tls_key": "key"}, "not a certificate and its key"),
        ({"credential_file": "missing"}, "credential_file: .*: No such file"),
        ({"credential_file": "empty"}, "credential_file: .* is empty"),
        ({"credential_file": "typo"}, "is not a credential, or is mistyped"),
        ({"credential_file": "key"}, "is not a credential"),
    ],
)
def test_invalid_files_are_rejected(files, given_, said):
    """The error names the argument, the cause and the remedy."""
    with pytest.raises(AccessError, match=said) as caught:
        Access(**{name: files[file] for name, file in given_.items()})
    assert CREDENTIAL[:-1] not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", " ", CREDENTIAL[:-1], CREDENTIAL + "0", "lk_" + "0" * 57],
    ids=["empty", "blank", "short", "long", "secret"],
)
def test_invalid_credentials_are_rejected(text):
    """The error does not show the credential. `credential` and `credential_file` exclude each
    other."""
    with pytest.raises(AccessError) as caught:
        Access(credential=text)
    assert not text.strip() or text not in str(caught.value)
    with pytest.raises(AccessError, match="exclude"):
        Access(credential=CREDENTIAL, credential_file="anything")


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.8.8:1", True),
        ("localhost:50051", True),
        ("localhost", True),
        ("[::1]:50051", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("unix:/run/latchkey.sock", True),
        ("unix:latchkey.sock", True),
        ("latchkey.internal:50051", False),
        ("10.0.0.1:50051", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        ("dns://127.0.0.1/example.org:1", False),
        ("dns:///example.org", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("xds:///localhost", False),
    ],
)
async def test_credential_is_not_sent_in_the_clear(files, target, local):
    """Without TLS, a credential is only sent to a target on this machine."""
    access = Access(credential=CREDENTIAL)
    if local:
        await Client(target, access=access).close()
    else:
        with pytest.raises(AccessError, match=r"unencrypted: give tls_ca"):
            Client(target, access=access)
    await Client(target, access=Access(credential=CREDENTIAL, tls_ca=files["ca"])).close()


async def test_access_from_the_environment(monkeypatch, files):
    """Without `access`, the environment applies and its mistakes are reported at once. A client
    with its own channel, or with gRPC credentials, ignores the environment."""
    names = {
        "TLS_CA": "ca",
        "TLS_CERTIFICATE": "certificate",
        "TLS_KEY": "key",
        "CREDENTIAL_FILE": "credential",
    }
    for name, file in names.items():
        monkeypatch.setenv(f"LATCHKEY_{name}", str(files[file]))
    client = Client("latchkey.internal:1")
    assert client.metadata() == (("authorization", f"Bearer {CREDENTIAL}"),)
    await client.close()
    assert Access.from_environment().channel_credentials is not None
    assert Access.from_environment({"LATCHKEY_TLS_CA": ""}).channel_credentials is None
    # The service's own certificate, on a machine that runs both service and client.
    services = {"LATCHKEY_TLS_CERTIFICATE": "/gone", "LATCHKEY_TLS_KEY": "/gone"}
    assert Access.from_environment(services).channel_credentials is None
    other = Access.from_environment(credential_file=files["credential"], tls_ca=module.SYSTEM)
    assert other.channel_credentials is not None
    monkeypatch.setenv("LATCHKEY_TLS_KEY", str(files["other key"]))
    with pytest.raises(AccessError, match="does not belong to"):
        Client("latchkey.internal:1")
    access = Access(tls_ca=files["ca"])
    with pytest.raises(AccessError, match="exclude"):
        Client("x:1", access=access, credentials=access.channel_credentials)
    await Client("x:1", credentials=access.channel_credentials).close()


def test_credential_file_is_read_again(monkeypatch, files):
    """A new credential in the file is used for later calls. An unreadable one changes nothing."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    access = Access(credential_file=files["credential"])

    def sent():
        clock[0] += 2
        return access.metadata()[0][1]

    assert sent() == f"Bearer {CREDENTIAL}"
    for text in ("", "half of i"):
        files["credential"].write_text(text)
        assert sent() == f"Bearer {CREDENTIAL}"
    files["credential"].unlink()
    assert sent() == f"Bearer {CREDENTIAL}"
    files["credential"].write_text(credential("another") + "\n")
    assert sent() == f"Bearer {credential('another')}"


async def test_a_verifier_takes_what_a_client_takes():
    """`access`, `credentials` and `options` of a Verifier reach the Client that it makes. With a
    Client that is passed in they contradict it."""
    access = Access(credential=CREDENTIAL)
    verifier = Verifier("127.0.0.1:1", access=access, options=[("grpc.lb_policy_name", "x")])
    assert verifier._client._access is access
    assert ("grpc.lb_policy_name", "x") in verifier._client._options
    await verifier.close()
    async with Client("127.0.0.1:1", access=Access()) as client:
        for more in (
            {"access": access},
            {"credentials": grpc.ssl_channel_credentials()},
            {"options": [("a", 1)]},
        ):
            with pytest.raises(AccessError, match="Client that is passed in"):
                Verifier(client, **more)
